# SPDX-License-Identifier: Apache-2.0
"""Convolutions of a network that was saved for ncnn: a text file ``.param`` and its weights in ``.bin``."""

from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

_MAGIC = "7767517"


_HALF_TAG = 0x01306B47  # weights of 16 bits follow


_FLOAT_TAG = 0


# Layers of networks of convolutions, sums and concatenations; all but convolutions have no weights.
_LAYERS = frozenset(["Input", "Split", "Convolution", "Concat", "Eltwise", "BinaryOp", "Interp"])


class NcnnConvolution(NamedTuple):
    """``weight`` [out, in, kernel, kernel], ``bias`` [out], and the slope of a LeakyReLU behind it, or None."""

    name: str
    weight: Tensor
    bias: Tensor
    slope: float | None


class _Shape(NamedTuple):
    name: str
    out: int
    kernel: int
    weights: int
    slope: float | None


def read_ncnn(path: Path) -> list[NcnnConvolution]:
    """Reads all convolutions in the order in which they run.

    Args:
        path: the ``.param`` or the ``.bin`` file; the other one lies beside it.

    Raises:
        ValueError: a file is missing, damaged, or of a network with other layers; the message names what.
    """
    param, weights = path.with_suffix(".param"), path.with_suffix(".bin")
    for file in (param, weights):
        if not file.is_file():
            raise ValueError(
                f"read_ncnn: expected {param.name} and {weights.name} in one folder, but {file} is missing"
            )
    shapes = _read_param(param)
    data, at, found = weights.read_bytes(), 0, []
    for shape in shapes:
        convolution, at = _read_convolution(weights, data, at, shape)
        found.append(convolution)
    if at != len(data):
        raise ValueError(f"read_ncnn: expected {weights} to have {at} bytes, got {len(data)}")
    return found


def _read_param(param: Path) -> list[_Shape]:
    lines = param.read_text(encoding="ascii", errors="replace").splitlines()
    if len(lines) < 2 or lines[0].strip() != _MAGIC:
        raise ValueError(f"read_ncnn: expected {param} to begin with {_MAGIC}, got {lines[0][:40] if lines else ''!r}")
    shapes = []
    try:
        if len(lines) - 2 < int(lines[1].split()[0]):
            raise ValueError(f"{lines[1].split()[0]} layers announced, {len(lines) - 2} found")
        for line in lines[2:]:
            kind, name, inputs, outputs, *rest = line.split()
            if kind not in _LAYERS:
                raise ValueError(f"layer {name} of type {kind}, which is not supported")
            if kind == "Convolution":
                shapes.append(_convolution_shape(name, rest[int(inputs) + int(outputs) :]))
    except (ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"read_ncnn: expected {param} to describe convolutions, got {error}") from error
    return shapes


def _convolution_shape(name: str, settings: list[str]) -> _Shape:
    values = dict(setting.split("=", 1) for setting in settings)
    out, kernel, count = int(values["0"]), int(values["1"]), int(values["6"])
    if out < 1 or kernel < 1 or count < 1 or count % (out * kernel * kernel) or values.get("5") != "1":
        raise ValueError(f"{name} with {' '.join(settings)}")
    slope = float(values["-23310"].split(",")[1]) if values.get("9") == "2" else None
    return _Shape(name, out, kernel, count, slope)


def _read_convolution(path: Path, data: bytes, at: int, shape: _Shape) -> tuple[NcnnConvolution, int]:
    """Tag, weights padded to 4 bytes, float32 biases."""
    tag = int.from_bytes(data[at : at + 4], "little")
    if tag not in (_HALF_TAG, _FLOAT_TAG) and at + 4 <= len(data):
        raise ValueError(f"read_ncnn: expected {shape.name} in {path} to hold float16 or float32, got tag {tag:#x}")
    dtype = numpy.dtype("<f2" if tag == _HALF_TAG else "<f4")
    size = -(-shape.weights * dtype.itemsize // 4) * 4
    end = at + 4 + size + 4 * shape.out
    if end > len(data):
        raise ValueError(f"read_ncnn: expected {path} to have at least {end} bytes for {shape.name}, got {len(data)}")
    weight = numpy.frombuffer(data, dtype, shape.weights, at + 4).astype(numpy.float32)
    bias = numpy.frombuffer(data, "<f4", shape.out, at + 4 + size).astype(numpy.float32)
    sizes = (shape.out, -1, shape.kernel, shape.kernel)
    return NcnnConvolution(shape.name, torch.from_numpy(weight).view(sizes), torch.from_numpy(bias), shape.slope), end

# SPDX-License-Identifier: Apache-2.0
"""Runs a network by another inference engine, through an ONNX file."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdense._support import InputError, extra


def engine(name: str, model: nn.Module, images: Tensor, threads: int) -> Callable[[Tensor], Tensor]:
    """What computes the logits of images of this shape by "onnxruntime" or "openvino", on the CPU.

    Args:
        model: plain modules, in eval mode.
        threads: of the engine.
    """
    with extra("export"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _write_onnx(model, images, path)
        return _onnxruntime(path, threads) if name == "onnxruntime" else _openvino(path, threads)


def _write_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    import onnxscript  # noqa: F401  (torch's exporter needs it)

    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            model,
            (images,),
            path,
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )


def _onnxruntime(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait for the next call would take the cores of the variant behind.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _openvino(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise InputError("bench: openvino is not installed; run: pip install openvino") from error

    compiled = openvino.compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": threads})
    return lambda images: torch.from_numpy(compiled([images.numpy()])[0])

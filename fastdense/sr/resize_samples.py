# SPDX-License-Identifier: Apache-2.0
"""Resizes the samples of a picture by bicubic resampling, whatever channels, depth and alpha they have."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from fastdense._choices import Preset
from fastdense.ops.bicubic import PRESETS, axis_order, bicubic_resize, sizes_and_steps
from fastdense.sr.samples import alpha_peak, check_finite, has_alpha, is_opaque

ALPHA = ("premultiplied", "straight")


def default_alpha(preset: str) -> str:
    """How the library of a preset resamples alpha: Pillow multiplies colours by it first, the others do not."""
    return "premultiplied" if preset.startswith("pillow") else "straight"


def resize_samples(
    samples: numpy.ndarray,
    size: tuple[int, int] | None,
    scale: float | None,
    preset: Preset,
    antialias: bool | None = None,
    alpha: str | None = None,
) -> numpy.ndarray:
    """Resizes a picture with the convention of a library.

    Args:
        samples: ``[H, W]`` or ``[H, W, C]``, C from 1 to 4, integers of up to 32 bits or floating point.
        size: height and width of the result.
        scale: instead of ``size``.
        preset, antialias: see :func:`fastdense.bicubic_resize`.
        alpha: "straight" resamples each channel as it is; "premultiplied" multiplies colours by alpha first and divides
            the result, so that colours of hidden pixels do not bleed. None is what the preset's library does.

    Returns:
        Samples of the same type; integers are rounded and saturated once, and as the library does it for 8 bits and
        for Pillow's 16.

    Raises:
        ValueError: sizes that are not positive, or samples that are not finite.
    """
    check_finite(samples, "the picture")
    pixels = samples if samples.ndim == 3 else samples[..., None]
    options = {"size": size, "scale_factor": scale, "preset": preset, "antialias": antialias}
    if not has_alpha(samples) or is_opaque(samples) or (alpha or default_alpha(preset)) == "straight":
        made = _resized(pixels, options)
    elif samples.dtype == numpy.uint8 and preset.startswith("pillow"):
        made = _resized_like_pillow(pixels, options)
    else:
        made = _resized_premultiplied(pixels, options)
    check_finite(made, "the result")
    return made if samples.ndim == 3 else made[..., 0]


def resized_size(
    samples: numpy.ndarray, size: tuple[int, int] | None, scale: float | None, preset: Preset
) -> tuple[int, int]:
    """Height and width of what :func:`resize_samples` makes.

    Raises:
        ValueError: a scale that leaves no sample, or too many.
    """
    height, width = sizes_and_steps(samples.shape[:2], size, scale, PRESETS[preset].rounding, False)[0]
    return height, width


def _resized(pixels: numpy.ndarray, options: dict[str, Any]) -> numpy.ndarray:
    dtype = pixels.dtype
    if dtype in (numpy.uint8, numpy.float32, numpy.float64):
        return _pixels(bicubic_resize(_planes(pixels.copy()), **options))
    if dtype == numpy.float16:
        return _pixels(bicubic_resize(_planes(pixels.astype(numpy.float32)), **options)).astype(dtype)
    planes = _planes(pixels.astype(numpy.float64))
    if dtype == numpy.uint16 and options["preset"].startswith("pillow"):
        return _pixels(_axis_by_axis(planes, options)).astype(dtype)
    return _rounded(_pixels(bicubic_resize(planes, **options)), dtype)


def _axis_by_axis(planes: Tensor, options: dict[str, Any]) -> Tensor:
    """Clipped and rounded to 16 bits after each axis, as Pillow does."""
    size, scale, preset = options["size"], options["scale_factor"], PRESETS[options["preset"]]
    sizes, steps = sizes_and_steps(planes.shape[2:], size, scale, preset.rounding, False)
    for axis in axis_order(planes.shape[2:], sizes, steps, preset.bytes):
        one = dict(options)
        if size is not None:
            one["size"] = [sizes[d] if d == axis else planes.shape[2 + d] for d in range(2)]
        else:
            one["scale_factor"] = [scale if d == axis else 1.0 for d in range(2)]
        planes = (bicubic_resize(planes, **one).clamp(0, 65535) + 0.5).floor()
    return planes


def _resized_like_pillow(pixels: numpy.ndarray, options: dict[str, Any]) -> numpy.ndarray:
    """In bytes and with the integer divisions of Pillow."""
    alpha = pixels[..., -1:].astype(numpy.int32)
    product = pixels[..., :-1] * alpha + 128
    product = ((product >> 8) + product) >> 8
    made = _resized(numpy.concatenate([product, alpha], 2).astype(numpy.uint8), options)
    alpha = made[..., -1:].astype(numpy.int32)
    colours = numpy.minimum(255 * made[..., :-1].astype(numpy.int32) // numpy.maximum(alpha, 1), 255)
    return numpy.where((alpha == 0) | (alpha == 255), made, numpy.concatenate([colours, alpha], 2)).astype(numpy.uint8)


def _resized_premultiplied(pixels: numpy.ndarray, options: dict[str, Any]) -> numpy.ndarray:
    dtype, peak = pixels.dtype, alpha_peak(pixels.dtype)
    values: Any = pixels.astype(numpy.float32 if dtype == numpy.float16 else numpy.float64)
    values[..., :-1] *= values[..., -1:] / peak
    return unpremultiplied(_pixels(bicubic_resize(_planes(values), **options)), dtype)


def unpremultiplied(values: numpy.ndarray, dtype: numpy.dtype) -> numpy.ndarray:
    """Floating-point colours times alpha, and alpha, as samples of a type; black where nothing is to be seen."""
    peak = alpha_peak(dtype)
    share = numpy.clip(values[..., -1:], 0, peak) / peak
    colours = numpy.divide(values[..., :-1], share, out=numpy.zeros_like(values[..., :-1]), where=share > 0)
    made = numpy.concatenate([colours, share * peak], 2)
    return _rounded(made, dtype) if numpy.issubdtype(dtype, numpy.integer) else made.astype(dtype)


def _rounded(values: numpy.ndarray, dtype: numpy.dtype) -> numpy.ndarray:
    known = numpy.iinfo(dtype)
    return numpy.floor(numpy.clip(values, known.min, known.max) + 0.5).astype(dtype)


def _planes(pixels: numpy.ndarray) -> Tensor:
    return torch.from_numpy(pixels).movedim(-1, 0)[None]


def _pixels(planes: Tensor) -> numpy.ndarray:
    return planes[0].movedim(0, -1).contiguous().numpy()

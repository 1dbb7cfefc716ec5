# SPDX-License-Identifier: Apache-2.0
"""Enlarges the samples of a picture by a network, whatever channels and depth they have."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from fastdense.models.sr.base import SuperResolutionNet
from fastdense.ops.bicubic import bicubic_resize
from fastdense.sr.quality import rgb_to_ycbcr, ycbcr_to_rgb
from fastdense.sr.upscaling import Progress, upscale

# Highest sample by type; float32 pictures are taken as they are.
_PEAKS = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}


def upscale_samples(
    samples: numpy.ndarray, net: SuperResolutionNet, max_memory: int | None = None, progress: Progress | None = None
) -> numpy.ndarray:
    """``[H, W]`` or ``[H, W, C]``, grey or RGB, with alpha or without, to the same at ``net.scale`` times the size.

    A network of the luminance enlarges Y, bicubic resampling the chroma; a network of RGB sees grey pictures as RGB.
    Alpha is enlarged by bicubic resampling.
    """
    peak = _PEAKS[str(samples.dtype)]
    pixels = samples if samples.ndim == 3 else samples[..., None]
    x = torch.from_numpy(pixels.astype(numpy.float32)).permute(2, 0, 1)[None] / peak
    colours = 3 if x.shape[1] >= 3 else 1
    out = _upscale_colours(x[:, :colours], net, max_memory, progress)
    if x.shape[1] > colours:
        out = torch.cat([out, _bicubic(x[:, colours:], net.scale)], 1)
    if samples.dtype != numpy.float32:
        out = (out.clamp(0, 1).double() * peak + 0.5).floor()
    made = out[0].permute(1, 2, 0).numpy().astype(samples.dtype)
    return made if samples.ndim == 3 else made[..., 0]


def _bicubic(x: Tensor, scale: int) -> Tensor:
    return bicubic_resize(x, scale_factor=scale, preset="matlab")


def _upscale_colours(x: Tensor, net: SuperResolutionNet, max_memory: int | None, progress: Progress | None) -> Tensor:
    def run(pictures: Tensor) -> Tensor:
        like = next(net.parameters())
        return upscale(net, pictures.to(like), max_memory=max_memory, progress=progress).cpu().float()

    if net.colours == x.shape[1]:
        return run(x)
    if net.colours == 3:
        return run(x.expand(-1, 3, -1, -1)).mean(1, keepdim=True)
    if net.colours != 1:
        raise ValueError(f"upscale: expected a network of 1 or 3 colours, got {net.colours}")
    ycbcr = rgb_to_ycbcr(x)
    return ycbcr_to_rgb(torch.cat([run(ycbcr[:, :1]), _bicubic(ycbcr[:, 1:], net.scale)], 1))

# SPDX-License-Identifier: Apache-2.0
"""Enlarges the samples of a picture by a network, whatever channels and depth they have."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from fastdense.models.sr.base import SuperResolutionNet
from fastdense.ops.bicubic import bicubic_resize
from fastdense.sr.quality import rgb_to_ycbcr, ycbcr_to_rgb
from fastdense.sr.samples import alpha_peak, check_finite, has_alpha, is_opaque, peak_of
from fastdense.sr.upscaling import Progress, upscale


def upscale_samples(
    samples: numpy.ndarray,
    net: SuperResolutionNet,
    max_memory: int | None = None,
    progress: Progress | None = None,
    alpha: str = "premultiplied",
) -> numpy.ndarray:
    """Enlarges a picture.

    A network of the luminance enlarges Y, bicubic resampling the chroma; a network of RGB sees grey pictures as RGB.

    Args:
        samples: ``[H, W]`` or ``[H, W, C]``, C from 1 to 4: grey or RGB, with alpha or without.
        net: the network.
        max_memory, progress: see :func:`fastdense.upscale`.
        alpha: "premultiplied" enlarges the colours times alpha, and alpha as a grey picture, both by the network, and
            divides: colours of hidden pixels do not bleed, edges have no fringes. "straight" enlarges the colours as
            they are, and alpha by bicubic resampling.

    Returns:
        Samples of the same type and channels, ``net.scale`` times as high and wide.

    Raises:
        ValueError: a network of other channels, white that is not known, or a result that is not finite.
    """
    check_finite(samples, "the picture")
    pixels = samples if samples.ndim == 3 else samples[..., None]
    peaks = [peak_of(samples)] * pixels.shape[2]
    if has_alpha(samples):
        peaks[-1] = alpha_peak(samples.dtype)
    x = torch.from_numpy((pixels / numpy.array(peaks)).astype(numpy.float32)).permute(2, 0, 1)[None]
    colours = 3 if x.shape[1] >= 3 else 1
    shown, hidden = x[:, :colours], x[:, colours:]

    def run(pictures: Tensor) -> Tensor:
        return _upscale_colours(pictures, net, max_memory, progress)

    if not has_alpha(samples):
        out = run(shown)
    elif is_opaque(samples) or alpha == "straight":
        out = torch.cat([run(shown), _bicubic(hidden, net.scale)], 1)
    else:
        share = run(hidden.expand(-1, colours, -1, -1)).mean(1, keepdim=True).clamp(0, 1)
        product = run(shown * hidden)
        out = torch.cat([torch.where(share > 0, product / share, torch.zeros(())), share], 1)
    if not numpy.issubdtype(samples.dtype, numpy.floating):
        out = (out.clamp(0, 1).double() * torch.tensor(peaks).view(1, -1, 1, 1) + 0.5).floor()
    made: Any = out[0].permute(1, 2, 0).numpy().astype(samples.dtype)
    check_finite(made, "the result")
    return made if samples.ndim == 3 else made[..., 0]


def _bicubic(x: Tensor, scale: int) -> Tensor:
    return bicubic_resize(x, scale_factor=scale, preset="matlab")


def _upscale_colours(x: Tensor, net: SuperResolutionNet, max_memory: int | None, progress: Progress | None) -> Tensor:
    def run(pictures: Tensor) -> Tensor:
        like = next(net.parameters())
        made = upscale(net, pictures.to(like), max_memory=max_memory, progress=progress).cpu().float()
        if not made.isfinite().all():
            raise ValueError(
                f"expected the network's result to be finite, got NaN or infinity in {like.dtype}; "
                f"try another --dtype, such as float32"
            )
        return made

    if net.colours not in (1, 3) or net.out_colours != net.colours:
        raise ValueError(
            f"expected a network from 1 or 3 channels to as many, got one from {net.colours} to {net.out_colours}"
        )
    if net.colours == x.shape[1]:
        return run(x)
    if net.colours == 3:
        return run(x.expand(-1, 3, -1, -1)).mean(1, keepdim=True)
    ycbcr = rgb_to_ycbcr(x)
    return ycbcr_to_rgb(torch.cat([run(ycbcr[:, :1]), _bicubic(ycbcr[:, 1:], net.scale)], 1))

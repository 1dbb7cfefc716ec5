# SPDX-License-Identifier: Apache-2.0
"""EDSR: residual blocks without norms."""

from typing import Any

import torch
from torch import Tensor, nn

from fastdense.models.sr.base import (
    ResidualBlock,
    SuperResolutionNet,
    check_rgb_range,
    check_scale,
    conv3x3,
    pixel_shuffles,
)

# RGB of the pictures that EDSR was trained on: subtracted in front and added behind.
_DIV2K_MEAN = (0.4488, 0.4371, 0.4040)


class EDSR(SuperResolutionNet):
    """Residual blocks without norms, then pixel shuffle.

    Args:
        scale: 2, 3 or 4.
        blocks: number of residual blocks.
        width: channels.
        residual_scale: factor of every residual; 0.1 in the large network.
        rgb_range: what stands for 1 inside.

    Shape:
        ``[N, 3, H, W]`` to ``[N, 3, scale * H, scale * W]``, RGB in [0, 1].

    Reference:
        B. Lim, S. Son, H. Kim, S. Nah, K. M. Lee. Enhanced Deep Residual Networks for Single Image Super-Resolution.
        CVPRW 2017, arXiv:1707.02921, table 1.
    """

    colours = 3
    halo = 2
    rgb_range: float = 255
    mean: Tensor

    def __init__(
        self,
        scale: int = 4,
        blocks: int = 16,
        width: int = 64,
        residual_scale: float = 1.0,
        rgb_range: float = 255,
    ) -> None:
        super().__init__()
        self.scale = self.tail_scale = check_scale("EDSR", scale)
        self.register_buffer("mean", torch.tensor(_DIV2K_MEAN).view(1, 3, 1, 1), persistent=False)
        self.conv_first = conv3x3(3, width)
        self.body = nn.Sequential(*(ResidualBlock(width, residual_scale) for _ in range(blocks)))
        self.conv_after_body = conv3x3(width, width)
        self.upsample = pixel_shuffles(width, scale)
        self.conv_last = conv3x3(width, 3)
        self.reach = 2 * blocks + 2
        self.residual_scale, self.rgb_range = residual_scale, check_rgb_range("EDSR", rgb_range)

    def parts(self) -> list[nn.Module]:
        return list(self.body)

    def settings(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "blocks": len(self.body),
            "width": self.conv_last.in_channels,
            "residual_scale": self.residual_scale,
            "rgb_range": self.rgb_range,
        }

    def live_values(self) -> tuple[int, int]:
        width = self.conv_last.in_channels
        return 4 * width, 3 * width * self.scale**2

    def trunk(self, x: Tensor) -> Tensor:
        first = self.conv_first((x - self.mean) * self.rgb_range)
        return first + self.conv_after_body(self.body(first))

    def tail(self, x: Tensor) -> Tensor:
        return self.conv_last(self.upsample(x)) / self.rgb_range + self.mean


def edsr_baseline(scale: int = 4, blocks: int = 16, width: int = 64) -> EDSR:
    """EDSR-baseline: 16 blocks of 64 channels."""
    return EDSR(scale, blocks, width)


def edsr(scale: int = 4, blocks: int = 32, width: int = 256) -> EDSR:
    """EDSR: 32 blocks of 256 channels, residuals scaled by 0.1."""
    return EDSR(scale, blocks, width, 0.1)

# SPDX-License-Identifier: Apache-2.0
"""VDSR: a deep residual network behind bicubic upsampling."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdense.models.sr.base import UpscaledFirst, conv3x3


@torch.no_grad()
def _hand_through(conv: nn.Conv2d) -> None:
    """Makes the first channel that of the input, so that a network of such convolutions begins as the identity."""
    middle = conv.kernel_size[0] // 2
    conv.weight[0].zero_()
    conv.weight[0, 0, middle, middle] = 1
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]


class VDSR(UpscaledFirst):
    """Twenty 3x3 convolutions that add to an enlarged picture what it lacks: ``y + convs(y)``, ``y = bicubic(x)``.

    Args:
        scale: 2, 3 or 4.
        depth: number of convolutions.
        width: channels between them.

    Shape:
        ``[N, 1, H, W]`` to ``[N, 1, scale * H, scale * W]``, luminance in [0, 1].

    Reference:
        J. Kim, J. K. Lee, K. M. Lee. Accurate Image Super-Resolution Using Very Deep Convolutional Networks. CVPR 2016,
        arXiv:1511.04587, section 3.1.
    """

    def __init__(self, scale: int = 2, depth: int = 20, width: int = 64) -> None:
        if depth < 2:
            raise ValueError(f"VDSR: expected depth to be at least 2, got {depth!r}")
        super().__init__(scale, depth)
        channels = [1, *[width] * (depth - 1), 1]
        self.convs = nn.ModuleList(conv3x3(channels[at], channels[at + 1], bias=False) for at in range(depth))
        for conv in self.convs:
            nn.init.kaiming_normal_(cast(nn.Conv2d, conv).weight, nonlinearity="relu")

    def settings(self) -> dict[str, Any]:
        first = cast(nn.Conv2d, self.convs[0])
        return {"scale": self.scale, "depth": len(self.convs), "width": first.out_channels}

    def refine(self, x: Tensor) -> Tensor:
        *hidden, last = self.convs
        y = x
        for conv in hidden:
            y = torch.relu(conv(y))
        return x + last(y)


def vdsr(scale: int = 2, depth: int = 20) -> VDSR:
    """VDSR of 20 convolutions."""
    return VDSR(scale, depth)

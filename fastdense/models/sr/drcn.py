# SPDX-License-Identifier: Apache-2.0
"""DRCN: one convolution applied again and again."""

from typing import Any

import torch
from torch import Tensor, nn

from fastdense.models.sr.base import UpscaledFirst, conv3x3


class DRCN(UpscaledFirst):
    """One convolution applied repeatedly, with an output from every state.

    With ``y = bicubic(x)``: ``h_0 = embed(y)``, ``h_d = relu(recursive(h_{d-1}))``, and the result is the mean of
    ``y + reconstruct(h_d)`` over ``d = 1 ... D`` with learned weights. In terms of
    :class:`fastdense.nn.HigherOrderNet` the states are a recurrence of order 1 in which all ``f`` and all ``g`` are
    shared.

    Args:
        scale: 2, 3 or 4.
        recursions: times ``D`` that the shared convolution is applied.
        width: channels of the states.

    Shape:
        ``[N, 1, H, W]`` to ``[N, 1, scale * H, scale * W]``, luminance in [0, 1].

    Reference:
        J. Kim, J. K. Lee, K. M. Lee. Deeply-Recursive Convolutional Network for Image Super-Resolution. CVPR 2016,
        arXiv:1511.04491, equations 2 to 8.
    """

    def __init__(self, scale: int = 2, recursions: int = 16, width: int = 256) -> None:
        if recursions < 1:
            raise ValueError(f"DRCN: expected recursions to be positive, got {recursions!r}")
        super().__init__(scale, recursions + 4)
        self.embed = nn.Sequential(conv3x3(1, width, False), nn.ReLU(), conv3x3(width, width, False), nn.ReLU())
        self.recursive = conv3x3(width, width, False)
        self.reconstruct = nn.Sequential(conv3x3(width, width, False), nn.ReLU(), conv3x3(width, 1, False))
        self.weights = nn.Parameter(torch.full((recursions,), 1 / recursions))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def settings(self) -> dict[str, Any]:
        return {"scale": self.scale, "recursions": len(self.weights), "width": self.recursive.out_channels}

    def live_values(self) -> tuple[int, int]:
        return 1, (len(self.weights) + 3) * self.recursive.out_channels * self.scale**2

    def states(self, y: Tensor) -> list[Tensor]:
        """``h_0 ... h_D`` of an enlarged picture."""
        states = [self.embed(y)]
        for _ in range(len(self.weights)):
            states.append(torch.relu(self.recursive(states[-1])))
        return states

    def supervised(self, y: Tensor) -> list[Tensor]:
        """The picture that every recursion makes: what the recursive supervision compares."""
        return [y + self.reconstruct(h) for h in self.states(y)[1:]]

    def refine(self, x: Tensor) -> Tensor:
        total = self.weights.sum()
        pictures = self.supervised(x)
        return sum(
            (w / total * picture for w, picture in zip(self.weights, pictures, strict=True)), torch.zeros_like(x)
        )


def drcn(scale: int = 2, recursions: int = 16, width: int = 256) -> DRCN:
    """DRCN with 16 recursions of 256 channels."""
    return DRCN(scale, recursions, width)

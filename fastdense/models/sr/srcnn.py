# SPDX-License-Identifier: Apache-2.0
"""SRCNN: three convolutions behind bicubic upsampling."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdense.models.sr.base import UpscaledFirst
from fastdense.models.sr.vdsr import _hand_through


class SRCNN(UpscaledFirst):
    """Three convolutions on an enlarged picture: ``conv(relu(conv(relu(conv(bicubic(x))))))``.

    Args:
        scale: 2, 3 or 4.
        kernels: sizes of the kernels; (9, 1, 5) and (9, 5, 5) are published.
        widths: channels of the two hidden layers.

    Shape:
        ``[N, 1, H, W]`` to ``[N, 1, scale * H, scale * W]``, luminance in [0, 1]. Borders are padded by zeros. With
        random weights the result is nearly the bicubic picture.

    Reference:
        C. Dong, C. C. Loy, K. He, X. Tang. Image Super-Resolution Using Deep Convolutional Networks. TPAMI 2016,
        arXiv:1501.00092, equations 1 to 3.

    Example:
        >>> SRCNN(scale=2)(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 1, 16, 16])
    """

    def __init__(
        self, scale: int = 2, kernels: tuple[int, int, int] = (9, 1, 5), widths: tuple[int, int] = (64, 32)
    ) -> None:
        if len(kernels) != 3 or any(k < 1 or k % 2 == 0 for k in kernels):
            raise ValueError(f"SRCNN: expected kernels to be three odd sizes, got {kernels!r}")
        super().__init__(scale, sum(k // 2 for k in kernels))
        channels = (1, *widths, 1)
        for at, kernel in enumerate(kernels):
            conv = nn.Conv2d(channels[at], channels[at + 1], kernel, padding=kernel // 2)
            self.add_module(f"conv{at + 1}", conv)
            _hand_through(conv)
        nn.init.normal_(conv.weight[:, 1:], std=1e-3)

    def settings(self) -> dict[str, Any]:
        first, second, last = (cast(nn.Conv2d, self._modules[f"conv{at}"]) for at in (1, 2, 3))
        return {
            "scale": self.scale,
            "kernels": [conv.kernel_size[0] for conv in (first, second, last)],
            "widths": [first.out_channels, second.out_channels],
        }

    def refine(self, x: Tensor) -> Tensor:
        first, second, last = (cast(nn.Conv2d, self._modules[f"conv{at}"]) for at in (1, 2, 3))
        return last(torch.relu(second(torch.relu(first(x)))))


def srcnn(scale: int = 2, kernels: tuple[int, int, int] = (9, 1, 5)) -> SRCNN:
    """SRCNN 9-1-5 (8,129 parameters), or 9-5-5 with ``kernels=(9, 5, 5)`` (57,281)."""
    return SRCNN(scale, kernels)

# SPDX-License-Identifier: Apache-2.0
"""The dense block of super-resolution networks in plain PyTorch."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdense.plain.arguments import check_positive


class PlainResidualDenseBlock(nn.Module):
    """A residual dense block in plain PyTorch: every layer concatenates all earlier features."""

    def __init__(
        self,
        channels: int = 64,
        growth_rate: int = 32,
        num_layers: int = 4,
        *,
        negative_slope: float = 0.2,
        fusion_kernel: int = 3,
        scale: float = 0.2,
        outer_scale: float = 0.2,
    ) -> None:
        super().__init__()
        check_positive("ResidualDenseBlock", channels=channels, growth_rate=growth_rate, num_layers=num_layers)
        if fusion_kernel not in (1, 3):
            raise ValueError(f"ResidualDenseBlock: expected fusion_kernel to be 1 or 3, got {fusion_kernel!r}")
        if negative_slope < 0:
            raise ValueError(f"ResidualDenseBlock: expected negative_slope to be at least 0, got {negative_slope!r}")
        for layer in range(num_layers):
            conv = nn.Conv2d(channels + layer * growth_rate, growth_rate, 3, padding=1)
            self.add_module(f"conv{layer + 1}", conv)
        width = channels + num_layers * growth_rate
        fusion = nn.Conv2d(width, channels, fusion_kernel, padding=fusion_kernel // 2)
        self.add_module(f"conv{num_layers + 1}", fusion)
        self.negative_slope, self.scale, self.outer_scale = negative_slope, scale, outer_scale

    def forward(self, input: Tensor, outer: Tensor | None = None) -> Tensor:
        *layers, fusion = cast(list[nn.Conv2d], list(self.children()))
        features = [input]
        for conv in layers:
            features.append(F.leaky_relu(conv(torch.cat(features, 1)), self.negative_slope, inplace=True))
        out = fusion(torch.cat(features, 1)) * self.scale + input
        return out if outer is None else out * self.outer_scale + outer

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}, scale={self.scale}, outer_scale={self.outer_scale}"

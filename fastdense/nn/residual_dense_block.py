# SPDX-License-Identifier: Apache-2.0
"""The dense block of super-resolution networks: no norm, local fusion, residual sums."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdense.nn.dense_block import _check_positive
from fastdense.nn.fused_residual import FusedResidualDenseBlock


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
        _check_positive("ResidualDenseBlock", channels=channels, growth_rate=growth_rate, num_layers=num_layers)
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


class ResidualDenseBlock(FusedResidualDenseBlock, PlainResidualDenseBlock):
    """A dense block without norms on one shared buffer, its local fusion and residual sum.

    Layer ``l`` maps ``[x_0, ..., x_l]`` to ``lrelu(conv3x3(.))``; the result is ``scale * conv(all) + x_0``, or
    ``outer_scale`` times that ``+ outer`` where an outer residual is given.

    Args:
        channels: ``C0`` of input and output.
        growth_rate: channels ``k`` that each layer adds.
        num_layers: number of layers ``L``; the convolutions are ``conv1 ... convL`` and the fusion ``conv{L+1}``.
        negative_slope: of LeakyReLU; 0 makes it ReLU.
        fusion_kernel: 3 as in ESRGAN or 1 as in RDN.
        scale: factor of the fusion.
        outer_scale: factor of the block where ``outer`` is given.

    Shape:
        ``[N, C0, H, W]``, and ``outer`` the same, to ``[N, C0, H, W]``.

    Note:
        Kept for backward: ``C0 + L * k`` numbers per pixel.

    Reference:
        Y. Zhang et al. Residual Dense Network. CVPR 2018, arXiv:1802.08797, equations 4 to 7; X. Wang et al. ESRGAN.
        ECCVW 2018, arXiv:1809.00219, section 3.1.

    Example:
        >>> ResidualDenseBlock(8, 4, 3)(torch.zeros(1, 8, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
    """

# SPDX-License-Identifier: Apache-2.0
"""Dual path blocks in plain PyTorch, with timm's parameter names."""

from typing import Any

import torch
from torch import Tensor, nn

from fastdense._choices import DUAL_PATH_MEMORY_MODES, DualPathMemoryMode
from fastdense.ops.arguments import check_memory
from fastdense.plain.activation import ActivationName, make_activation
from fastdense.plain.norm import NormName, make_norm
from fastdense.plain.stochastic_depth import StochasticDepth

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class NormRelu(nn.Module):
    """Norm and activation.

    Args:
        in_channels: channels of the input.
        spatial_dims: 1, 2 or 3.
        eps: of the norm; DPNs have 1e-3.
        norm, act: see :class:`fastdense.nn.DualPathBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        spatial_dims: int = 2,
        eps: float = 1e-3,
        norm: NormName = "batch",
        act: ActivationName = "relu",
    ) -> None:
        super().__init__()
        self.bn = make_norm("DualPathBlock", norm, in_channels, spatial_dims, eps=eps)
        self.relu = make_activation("DualPathBlock", act)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(x))


class NormReluConv(NormRelu):
    """Norm, activation, convolution without bias, padded by half its kernel."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        spatial_dims: int = 2,
        eps: float = 1e-3,
        norm: NormName = "batch",
        act: ActivationName = "relu",
    ) -> None:
        super().__init__(in_channels, spatial_dims=spatial_dims, eps=eps, norm=norm, act=act)
        self.conv = _CONV[spatial_dims - 1](
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(super().forward(x))


class PlainDualPathBlock(nn.Module):
    """A dual path block in plain PyTorch; see :class:`DualPathBlock`."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        residual_channels: int,
        growth_rate: int,
        *,
        groups: int = 1,
        projection: bool = False,
        stride: int = 1,
        split_last: bool = False,
        spatial_dims: int = 2,
        stochastic_depth: StochasticDepth | None = None,
        eps: float = 1e-3,
        memory: DualPathMemoryMode = "balanced",
        norm: NormName = "batch",
        act: ActivationName = "relu",
    ) -> None:
        super().__init__()
        if stride not in (1, 2) or (stride == 2 and not projection):
            raise ValueError(
                f"DualPathBlock: expected stride to be 1, or 2 with a projection, got {stride!r} "
                f"with projection={projection!r}"
            )
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"DualPathBlock: expected spatial_dims to be 1, 2 or 3, got {spatial_dims!r}")
        if not projection and in_channels < residual_channels:
            raise ValueError(
                f"DualPathBlock: expected in_channels to be at least residual_channels = {residual_channels} "
                f"without a projection, got {in_channels!r}"
            )
        if width % groups:
            raise ValueError(f"DualPathBlock: expected width to be a multiple of groups = {groups}, got {width!r}")

        of_norms: Any = {"spatial_dims": spatial_dims, "eps": eps, "norm": norm, "act": act}

        def conv(channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> NormReluConv:
            return NormReluConv(channels, out, kernel, stride=stride, groups=groups, **of_norms)

        self.num_1x1_c = residual_channels
        self.growth_rate = growth_rate
        if projection:  # timm's and the authors' names
            first = conv(in_channels, residual_channels + 2 * growth_rate, stride=stride)
            self.add_module(f"c1x1_w_s{stride}", first)
        self.c1x1_a = conv(in_channels, width)
        self.c3x3_b = conv(width, width, 3, stride, groups)
        if split_last:
            last = _CONV[spatial_dims - 1]
            self.c1x1_c = NormRelu(width, **of_norms)
            self.c1x1_c1 = last(width, residual_channels, 1, bias=False)
            self.c1x1_c2 = last(width, growth_rate, 1, bias=False)
        else:
            self.c1x1_c = conv(width, residual_channels + growth_rate)
        self.out_channels = (residual_channels + 2 * growth_rate if projection else in_channels) + growth_rate
        self.memory = check_memory("DualPathBlock", memory, DUAL_PATH_MEMORY_MODES)
        if stochastic_depth is not None:
            self.stochastic_depth = stochastic_depth

    def forward(self, x: Tensor) -> Tensor:
        start = x
        for name in ("c1x1_w_s1", "c1x1_w_s2"):
            if name in self._modules:
                start = self._modules[name](x)  # type: ignore[misc]
        r = self.num_1x1_c
        if "stochastic_depth" in self._modules:
            zeros = start.new_zeros(start.shape[0], r + self.growth_rate, *start.shape[2:])
            z = self.stochastic_depth(self.branch, x, zeros)
        else:
            z = self.branch(x)
        return torch.cat([start[:, :r] + z[:, :r], start[:, r:], z[:, r:]], 1)

    def branch(self, x: Tensor) -> Tensor:
        """``z``: what is added to the residual path and what is appended to the dense path."""
        z = self.c1x1_c(self.c3x3_b(self.c1x1_a(x)))
        return torch.cat([self.c1x1_c1(z), self.c1x1_c2(z)], 1) if "c1x1_c1" in self._modules else z

# SPDX-License-Identifier: Apache-2.0
"""Dual path blocks and stages, plain and fused, with timm's parameter names."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdense.nn.fused import FusedSequential, check_memory
from fastdense.nn.fused_dual_path import FusedDualPathBlock
from fastdense.nn.stochastic_depth import StochasticDepth, survivals
from fastdense.ops.dual_path import DUAL_PATH_MEMORY_MODES

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class NormRelu(nn.Module):
    """Batch norm and ReLU.

    Args:
        in_channels: channels of the input.
        spatial_dims: 1, 2 or 3.
        eps: of the norm; DPNs have 1e-3.
    """

    def __init__(self, in_channels: int, *, spatial_dims: int = 2, eps: float = 1e-3) -> None:
        super().__init__()
        self.bn = _NORM[spatial_dims - 1](in_channels, eps=eps)
        self.relu: nn.Module = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(x))


class NormReluConv(NormRelu):
    """Batch norm, ReLU, convolution without bias, padded by half its kernel."""

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
    ) -> None:
        super().__init__(in_channels, spatial_dims=spatial_dims, eps=eps)
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
        memory: str = "balanced",
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

        def conv(channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> NormReluConv:
            return NormReluConv(channels, out, kernel, stride=stride, groups=groups, spatial_dims=spatial_dims, eps=eps)

        self.num_1x1_c = residual_channels
        self.growth_rate = growth_rate
        if projection:  # timm's and the authors' names
            first = conv(in_channels, residual_channels + 2 * growth_rate, stride=stride)
            self.add_module(f"c1x1_w_s{stride}", first)
        self.c1x1_a = conv(in_channels, width)
        self.c3x3_b = conv(width, width, 3, stride, groups)
        if split_last:
            last = _CONV[spatial_dims - 1]
            self.c1x1_c = NormRelu(width, spatial_dims=spatial_dims, eps=eps)
            self.c1x1_c1 = last(width, residual_channels, 1, bias=False)
            self.c1x1_c2 = last(width, growth_rate, 1, bias=False)
        else:
            self.c1x1_c = conv(width, residual_channels + growth_rate)
        self.out_channels = (residual_channels + 2 * growth_rate if projection else in_channels) + growth_rate
        self.memory = check_memory(memory, DUAL_PATH_MEMORY_MODES)
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


class DualPathBlock(FusedDualPathBlock, PlainDualPathBlock):
    """A dual path block: the first channels form a residual path, the others a dense path.

    With ``[r; d]`` for the input, or for its projection at the head of a stage, and ``z`` for
    ``conv_c(relu(norm(conv_b(relu(norm(conv_a(relu(norm(input)))))))))``, the output is ``[r + z[:R]; d; z[R:]]``.

    Args:
        in_channels: channels of the input.
        width: channels of the bottleneck.
        residual_channels: ``R``.
        growth_rate: channels ``K`` that the block appends.
        groups: of the 3x3 convolution.
        projection: whether a 1x1 convolution to ``R + 2 * K`` channels makes both paths: the head of a stage.
        stride: of the projection and the 3x3 convolution, 1 or 2.
        split_last: whether the last 1x1 convolution is two, one a path: the "b" variants of the published networks.
        spatial_dims: 1, 2 or 3.
        stochastic_depth: leaves ``z`` out at random: then the output is ``[r; d; 0]``, ``[r + b z[:R]; d; b z[R:]]`` in
            general. A projection always runs.
        eps: of all norms.
        memory: what is kept for the backward pass, see :func:`fastdense.ops.dual_path_stage`.

    Shape:
        ``[N, in_channels, spatial]`` to ``[N, out_channels, spatial / stride]``.

    Note:
        Sub-modules may be replaced, frozen or hooked: where the fused operator cannot stand in for them, the block
        runs plainly and warns once. Blocks in a row in a :class:`DualPathStage` share one operator call.

    Reference:
        Y. Chen et al. Dual Path Networks. NIPS 2017, arXiv:1707.01629, equations 5 to 8.

    Example:
        >>> block = DualPathBlock(24, 8, residual_channels=16, growth_rate=4, groups=2)
        >>> block(torch.zeros(2, 24, 6, 6)).shape
        torch.Size([2, 28, 6, 6])
    """


class DualPathStage(FusedSequential, nn.Sequential):
    """Dual path blocks ``block1 ... blockn`` in a row, as one operator call.

    Args:
        num_blocks: number of blocks ``n``.
        in_channels: channels of the input.
        width, residual_channels, growth_rate, groups, split_last, spatial_dims, eps, memory: of every block, see
            :class:`DualPathBlock`.
        projection, stride: of the first block.
        survival, survival_mode, survival_scale: stochastic depth, as of :class:`fastdense.nn.DenseBlock`, for blocks in
            the place of layers.

    Note:
        A block that stochastic depth leaves out is not computed, its norms (but a projection's) keep their statistics,
        its parameters get no gradient, and nothing is kept for it but the zeros that it appends. It ends the operator
        call: every row of blocks between such blocks is a call of its own, which keeps its own copy of both paths.

    Shape:
        ``[N, in_channels, spatial]`` to ``[N, R + (n + 2) * K, spatial / stride]`` with a projection.

    Example:
        >>> stage = DualPathStage(3, 10, 8, residual_channels=16, growth_rate=4, groups=2, stride=2)
        >>> stage(torch.zeros(2, 10, 6, 6)).shape
        torch.Size([2, 36, 3, 3])
    """

    def __init__(
        self,
        num_blocks: int,
        in_channels: int,
        width: int,
        residual_channels: int,
        growth_rate: int,
        *,
        groups: int = 1,
        projection: bool = True,
        stride: int = 1,
        split_last: bool = False,
        spatial_dims: int = 2,
        survival: float | Sequence[float] = 1.0,
        survival_mode: str = "batch",
        survival_scale: str = "test",
        eps: float = 1e-3,
        memory: str = "balanced",
    ) -> None:
        if not isinstance(num_blocks, int) or num_blocks < 1:
            raise ValueError(f"DualPathStage: expected num_blocks to be a positive integer, got {num_blocks!r}")
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for index, p in enumerate(survivals("DualPathStage", num_blocks, survival)):
            block = DualPathBlock(
                channels,
                width,
                residual_channels,
                growth_rate,
                groups=groups,
                projection=projection and index == 0,
                stride=stride if index == 0 else 1,
                split_last=split_last,
                spatial_dims=spatial_dims,
                stochastic_depth=StochasticDepth(p, survival_mode, survival_scale) if p < 1 else None,
                eps=eps,
                memory=memory,
            )
            blocks[f"block{index + 1}"] = block
            channels = block.out_channels
        super().__init__(blocks)
        self.out_channels = channels

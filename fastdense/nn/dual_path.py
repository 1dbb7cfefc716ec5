# SPDX-License-Identifier: Apache-2.0
"""Dual path blocks and stages that run as one operator, or on a shared buffer."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from fastdense._choices import DualPathMemoryMode, SurvivalMode, SurvivalScale
from fastdense.fusion.dual_path import FusedDualPathBlock
from fastdense.fusion.sequential import FusedSequential
from fastdense.plain.activation import ActivationName
from fastdense.plain.dual_path import NormRelu as NormRelu
from fastdense.plain.dual_path import NormReluConv as NormReluConv
from fastdense.plain.dual_path import PlainDualPathBlock
from fastdense.plain.norm import NormName
from fastdense.plain.stochastic_depth import StochasticDepth, survivals


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
        stochastic_depth: drops ``z`` at random. The output is ``[r + b z[:R]; d; b z[R:]]``: ``[r; d; 0]`` if it is
            dropped. A projection always runs.
        eps: of all norms.
        memory: what is saved for backward, see :func:`fastdense.ops.dual_path_stage`.
        norm, act: the norms and the activation, as of :class:`DenseBlock`. Only "batch" with "relu" runs as one
            operator. With others the block runs as plain modules: with ``memory`` "min" or "recompute" once more in the
            backward pass, so that a stage saves its input, its output and the residual path of each block; else it
            warns once.

    Shape:
        ``[N, in_channels, spatial]`` to ``[N, out_channels, spatial / stride]``.

    Note:
        Sub-modules may be replaced, frozen or hooked. If the fused operator cannot replace them, the block runs as it
        does with another norm; hooks make it run as plain modules. Consecutive blocks of a :class:`DualPathStage` share
        one operator call, or one buffer.

    Reference:
        Y. Chen et al. Dual Path Networks. NIPS 2017, arXiv:1707.01629, equations 5 to 8.

    Example:
        >>> block = DualPathBlock(24, 8, residual_channels=16, growth_rate=4, groups=2)
        >>> block(torch.zeros(2, 24, 6, 6)).shape
        torch.Size([2, 28, 6, 6])
    """


class DualPathStage(FusedSequential, nn.Sequential):
    """Consecutive dual path blocks ``block1 ... blockn``, as one operator call or on one buffer.

    Args:
        num_blocks: number of blocks ``n``.
        in_channels: channels of the input.
        width, residual_channels, growth_rate, groups, split_last, spatial_dims, eps, memory, norm, act: of every
            block, see :class:`DualPathBlock`.
        projection, stride: of the first block.
        survival, survival_mode, survival_scale: stochastic depth as in :class:`fastdense.nn.DenseBlock`, for blocks
            instead of layers.

    Note:
        A block that stochastic depth drops is not computed. The running statistics of its norms (except a projection's)
        do not change, its parameters get no gradient, and only the zeros that it appends are saved. A dropped block
        splits the stage: each run of blocks between dropped ones is one operator call with its own copy of both paths.

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
        survival_mode: SurvivalMode = "batch",
        survival_scale: SurvivalScale = "test",
        eps: float = 1e-3,
        memory: DualPathMemoryMode = "balanced",
        norm: NormName = "batch",
        act: ActivationName = "relu",
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
                norm=norm,
                act=act,
            )
            blocks[f"block{index + 1}"] = block
            channels = block.out_channels
        super().__init__(blocks)
        self.out_channels = channels

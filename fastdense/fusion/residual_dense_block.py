# SPDX-License-Identifier: Apache-2.0
"""The mixins that run dense blocks without norms as one operator."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from fastdense._choices import MemoryMode
from fastdense.fusion.base import FusedModule, check_runs_here, run_fused, run_plain
from fastdense.fusion.checks import NotFusible, has_no_hooks
from fastdense.fusion.residual_layers import GrowingLayers, read_growing_block, read_residual_block, runs_layers_apart
from fastdense.ops.residual_dense_block import FlatResidualBlock, flatten_residual_block, run_flat_residual_block


class ResidualPlan(NamedTuple):
    """A residual dense block as the operator wants it."""

    flat: FlatResidualBlock
    negative_slope: float
    scale: float
    outer_scale: float


class FusedResidualDenseBlock(FusedModule):
    """A residual dense block: its convolutions in order, the last one the local fusion.

    The buffer is saved for backward, with "recompute" the input.
    """

    def forward(self, input: Tensor, outer: Tensor | None = None) -> Tensor:
        others = () if outer is None else (outer,)  # other libraries' blocks take one argument
        if runs_layers_apart(self):
            return run_plain(self, input, *others)
        return run_fused(self, _plan, _run, input, *others)


def _plan(module: nn.Module) -> ResidualPlan:
    block = read_residual_block(module)
    flat = flatten_residual_block(block.layers, block.fusion)
    return ResidualPlan(flat, block.negative_slope, block.scale, float(getattr(module, "outer_scale", 1.0)))


def _run(
    plan: ResidualPlan, memory: MemoryMode, contiguous: bool, input: Tensor, outer: Tensor | None = None
) -> Tensor:
    check_runs_here("residual_dense_block", input)
    return run_flat_residual_block(
        input,
        plan.flat,
        negative_slope=plan.negative_slope,
        scale=plan.scale,
        outer=outer,
        outer_scale=plan.outer_scale,
        memory=memory,
        contiguous=contiguous,
    )


class GrowingPlan(NamedTuple):
    """Blocks of SRDenseNet in a row, as the operator wants them."""

    blocks: int
    flat: FlatResidualBlock
    negative_slope: float


class FusedSRDenseBlock(FusedModule):
    """A block of SRDenseNet; several in a :class:`fastdense.fusion.sequential.FusedSequential` run on one buffer.

    The buffer, which is the output, is saved for backward, with "recompute" the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        return run_fused(self, _plan_one, run_growing, x)


def _plan_one(block: nn.Module) -> GrowingPlan:
    return plan_growing([block])


def plan_growing(row: Sequence[nn.Module]) -> GrowingPlan:
    """Plans the blocks that a row of modules begins with; raises NotFusible where the first cannot be fused."""
    blocks: list[GrowingLayers] = []
    for module in row:
        if len(row) > 1 and not has_no_hooks(module):
            break
        try:
            block = read_growing_block(module)
        except NotFusible:
            if not blocks:
                raise
            break  # the row ends in front of what cannot be fused
        if blocks and not _goes_on(blocks[-1], block):
            break
        blocks.append(block)
    if not blocks:
        raise NotFusible("it has hooks")
    layers = [layer for block in blocks for layer in block.layers]
    first_channels = [first for block in blocks for first in block.first_channels]
    return GrowingPlan(len(blocks), flatten_residual_block(layers, None, first_channels), blocks[0].negative_slope)


def _goes_on(block: GrowingLayers, behind: GrowingLayers) -> bool:
    return (behind.in_channels, behind.growth_rate, behind.negative_slope) == (
        block.out_channels,
        block.growth_rate,
        block.negative_slope,
    )


def run_growing(plan: GrowingPlan, memory: MemoryMode, contiguous: bool, x: Tensor) -> Tensor:
    check_runs_here("residual_dense_block", x)
    return run_flat_residual_block(
        x, plan.flat, negative_slope=plan.negative_slope, memory=memory, contiguous=contiguous
    )

# SPDX-License-Identifier: Apache-2.0
"""The mixins that run dense blocks without norms as one operator."""

from collections.abc import Sequence

from torch import Tensor, nn

from fastdense.fusion.base import FusedModule, Run, check_runs_here, is_traced
from fastdense.fusion.checks import NotFusible, has_no_hooks
from fastdense.fusion.residual_layers import GrowingLayers, read_growing_block, read_residual_block
from fastdense.ops import residual_dense_block


class FusedResidualDenseBlock(FusedModule):
    """A residual dense block: its convolutions in order, the last one the local fusion.

    There is one memory mode, by whatever name: the buffer alone is kept.
    """

    def forward(self, input: Tensor, outer: Tensor | None = None) -> Tensor:
        others = () if outer is None else (outer,)  # other libraries' blocks take one argument
        if is_traced(input):
            return self.plain_forward(input, *others)
        try:
            return self.run(input, outer)
        except NotFusible as reason:
            return self.fall_back(input, reason, *others)

    def run(self, input: Tensor, outer: Tensor | None) -> Tensor:
        check_runs_here("residual_dense_block", input)
        block = read_residual_block(self)
        return residual_dense_block(
            input,
            block.layers,
            block.fusion,
            negative_slope=block.negative_slope,
            scale=block.scale,
            outer=outer,
            outer_scale=float(getattr(self, "outer_scale", 1.0)),
        )


class FusedSRDenseBlock(FusedModule):
    """A block of SRDenseNet; several in a :class:`fastdense.fusion.sequential.FusedSequential` run on one buffer.

    There is one memory mode, by whatever name: the buffer, which is the result, is all that is kept.
    """

    def forward(self, x: Tensor) -> Tensor:
        if is_traced(x):
            return self.plain_forward(x)
        try:
            return _run_growing(x, [read_growing_block(self)])
        except NotFusible as reason:
            return self.fall_back(x, reason)

    def fused_run(self, behind: Sequence[nn.Module]) -> Run | None:
        blocks: list[GrowingLayers] = []
        try:
            for module in (self, *behind):
                if type(module).forward is not FusedSRDenseBlock.forward or not has_no_hooks(module):
                    break
                block = read_growing_block(module)
                if blocks and not _goes_on(blocks[-1], block):
                    break
                blocks.append(block)
        except NotFusible:
            pass  # the row ends in front of what cannot be fused
        return Run(len(blocks), lambda x: _run_growing(x, blocks)) if blocks else None


def _goes_on(block: GrowingLayers, behind: GrowingLayers) -> bool:
    return (behind.in_channels, behind.growth_rate, behind.negative_slope) == (
        block.out_channels,
        block.growth_rate,
        block.negative_slope,
    )


def _run_growing(x: Tensor, blocks: list[GrowingLayers]) -> Tensor:
    check_runs_here("residual_dense_block", x)
    return residual_dense_block(
        x,
        [layer for block in blocks for layer in block.layers],
        None,
        negative_slope=blocks[0].negative_slope,
        first_channels=[first for block in blocks for first in block.first_channels],
    )

# SPDX-License-Identifier: Apache-2.0
"""The mixin that runs a residual dense block as one operator."""

from torch import Tensor

from fastdense.nn.fused import FusedModule, check_runs_here, is_traced
from fastdense.nn.residual_structure import read_residual_block
from fastdense.nn.structure import NotFusible
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

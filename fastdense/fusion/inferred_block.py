# SPDX-License-Identifier: Apache-2.0
"""The mixin that runs a dense block of an unknown class as one operator."""

from typing import Any

from torch import Tensor

from fastdense.fusion.base import FusedModule, check_runs_here, is_traced, plain_class
from fastdense.fusion.batch_statistics import process_group_of
from fastdense.fusion.checks import NotFusible
from fastdense.fusion.dense_block import FusedDenseBlock, run_block
from fastdense.fusion.dense_layers import Tail, norms_of
from fastdense.fusion.inferred_layers import read_inferred_block, read_inferred_layers


class FusedInferredBlock(FusedDenseBlock):
    """A dense block of an unknown class that passed the equivalence check; with other inputs than one tensor, its own
    code runs."""

    def run(self, input: Tensor, tail: Tail | None) -> Tensor:
        block = read_inferred_block(self)
        return run_block(input, block.layers, tail, self.memory, prepends_features=block.prepends_features)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if named or len(inputs) != 1 or isinstance(inputs[0], list | tuple):
            return plain_class(type(self)).forward(self, *inputs, **named)
        return super().forward(inputs[0])

    run_forward = forward


class FusedInferredLayers(FusedModule):
    """A sequence that ends with layers of a dense block, each of which hands on what it got beside what it made."""

    def forward(self, input: Tensor) -> Tensor:
        if is_traced(input):
            return self.plain_forward(input)
        try:
            block = read_inferred_layers(self)
            # Whatever may keep the layers from being fused is found before other modules have run.
            check_runs_here("dense_block", input)
            process_group_of(norms_of(block.layers, None))
        except NotFusible as reason:
            return self.fall_back(input, reason)
        for head in list(self.children())[: block.heads]:
            input = head(input)
        return run_block(input, block.layers, None, self.memory, prepends_features=block.prepends_features)

# SPDX-License-Identifier: Apache-2.0
"""The mixin that runs a dense block of an unknown class as one operator."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdense._choices import MemoryMode
from fastdense.fusion.base import FusedModule, check_runs_here, run_fused
from fastdense.fusion.batch_statistics import process_group_of
from fastdense.fusion.dense_block import BlockPlan, FusedDenseBlock, plan_block, run_block, say_that_stem_is_plain
from fastdense.fusion.inferred_layers import read_inferred_block, read_inferred_layers
from fastdense.fusion.plan.state import plain_class, state_of


class FusedInferredBlock(FusedDenseBlock):
    """A dense block of an unknown class that passed the equivalence check; with other inputs than one tensor, its own
    code runs."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if named or len(inputs) != 1 or isinstance(inputs[0], list | tuple):
            return plain_class(type(self)).forward(self, *inputs, **named)
        say_that_stem_is_plain(self, inputs[0])
        return run_fused(self, plan, run_block, inputs[0])


def plan(module: nn.Module) -> BlockPlan:
    """Plans the block alone."""
    block = read_inferred_block(module)
    return plan_block(block.layers, None, prepends_features=block.prepends_features, freezer=state_of(module).freezer)


class LayersPlan(NamedTuple):
    """Modules that run one by one, and the dense block behind them."""

    heads: list[nn.Module]
    block: BlockPlan


class FusedInferredLayers(FusedModule):
    """A sequence that ends with layers of a dense block, each of which hands on what it got beside what it made."""

    def forward(self, input: Tensor) -> Tensor:
        return run_fused(self, plan_layers, _run_layers, input)


def plan_layers(module: nn.Module) -> LayersPlan:
    """Plans the layers that a sequence ends with."""
    block = read_inferred_layers(module)
    layers = plan_block(block.layers, None, prepends_features=block.prepends_features, freezer=state_of(module).freezer)
    return LayersPlan(list(module.children())[: block.heads], layers)


def _run_layers(plan: LayersPlan, memory: MemoryMode, contiguous: bool, input: Tensor) -> Tensor:
    # Whatever may keep the layers from being fused is found before other modules have run.
    check_runs_here("dense_block", input)
    process_group_of(plan.block.synchronised)
    for head in plan.heads:
        input = head(input)
    return run_block(plan.block, memory, contiguous, input)

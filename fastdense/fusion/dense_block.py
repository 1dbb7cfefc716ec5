# SPDX-License-Identifier: Apache-2.0
"""The mixins that run a dense block, or a transition, as one operator."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdense._choices import DUAL_PATH_MEMORY_MODES, MemoryMode
from fastdense.fusion.base import FusedModule, Run, check_runs_here, is_traced
from fastdense.fusion.batch_statistics import group_name, process_group_of, update_norms
from fastdense.fusion.channel_order import PrependedFeatures
from fastdense.fusion.checks import NotFusible, check_no_global_hooks, has_no_hooks
from fastdense.fusion.dense_layers import (
    Layer,
    Tail,
    draw_factors,
    layer_weights,
    norms_of,
    read_block,
    read_last_norm,
    read_transition,
    tail_weights,
)
from fastdense.fusion.max_pool_transition import read_max_pool_transition, run_recomputed
from fastdense.ops import dense_block
from fastdense.ops.arguments import count_pixels
from fastdense.plain.stochastic_depth import statistics_move_if


def run_block(
    input: Tensor, layers: list[Layer], tail: Tail | None, memory: MemoryMode, *, prepends_features: bool = False
) -> Tensor:
    """One operator call for a block and its tail, then the running statistics of all its norms.

    Args:
        prepends_features: the modules' channels are in the order last layer's, ... first layer's, input; those of
            the result as well. The buffer's order is the other one; weights and statistics are brought to it and back.
    """
    check_runs_here("dense_block", input)
    drop_rate = layers[0].drop_rate if layers else 0.0
    seed = None
    if drop_rate > 0:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=input.device)
    group = process_group_of(norms_of(layers, tail))
    factors = draw_factors(layer.depth for layer in layers)
    dropped = [not isinstance(factor, Tensor) and factor == 0 for factor in factors]
    growth = layers[0].conv2.weight.shape[0] if layers else 0
    channels = input.shape[1] + len(layers) * growth
    order = PrependedFeatures(growth, input.shape[1]) if prepends_features and layers else None
    weights = [layer_weights(layer, factor) for layer, factor in zip(layers, factors, strict=True)]
    read_by = tail_weights(tail) if tail is not None else None
    out, statistics = dense_block(
        input,
        weights if order is None else [order.layer(layer) for layer in weights],
        tail=read_by if order is None or read_by is None else order.tail(read_by),
        drop_rate=drop_rate,
        seed=seed,
        memory=memory,
        process_group=group_name(group),
        active=[not d for d in dropped] if any(dropped) else None,
    )
    if order is not None:
        statistics = order.statistics(statistics, channels)
        out = out if read_by is not None and read_by.conv is not None else order.from_buffer(out)
    next_offset = channels
    bottlenecks = {id(layer.norm2) for layer in layers if layer.norm2 is not None}
    left_out = {id(norm) for layer, d in zip(layers, dropped, strict=True) if d for norm in norms_of([layer], None)}
    norms: list[tuple[Any, int]] = []
    for norm in norms_of(layers, tail):
        is_bottleneck = id(norm) in bottlenecks
        if id(norm) not in left_out:
            first = channels - norm.num_features if prepends_features else 0
            norms.append((norm, next_offset if is_bottleneck else first))
        next_offset += norm.num_features if is_bottleneck else 0
    with contextlib.ExitStack() as stack:
        for layer, factor in zip(layers, factors, strict=True):
            if isinstance(factor, Tensor):
                stack.enter_context(statistics_move_if(factor != 0, norms_of([layer], None)))
        update_norms(norms, statistics, count_pixels(input), group)
    return out


class FusedDenseBlock(FusedModule):
    """A dense block whose layers are children ``norm1 ... conv2`` in order."""

    def run(self, input: Tensor, tail: Tail | None) -> Tensor:
        return run_block(input, read_block(self), tail, self.memory)

    def forward(self, init_features: Tensor) -> Tensor:
        if is_traced(init_features):
            return self.plain_forward(init_features)
        try:
            return self.run(init_features, None)
        except NotFusible as reason:
            return self.fall_back(init_features, reason)

    # The one forward that may be left out, where the block runs together with what follows it.
    run_forward = forward

    def fused_run(self, behind: Sequence[nn.Module]) -> Run | None:
        tail = _read_pair(self, behind[0]) if behind else None
        if tail is None:
            return None
        return Run(2, lambda input: self.run(input, tail))


class FusedTransition(FusedModule):
    """A transition: children norm, relu, conv, pool."""

    def forward(self, input: Tensor) -> Tensor:
        if is_traced(input):
            return self.plain_forward(input)
        try:
            return run_block(input, [], read_transition(self), self.memory)
        except NotFusible as reason:
            return self.fall_back(input, reason)


class RecomputedTransition(FusedModule):
    """A transition with a max pool: norm, ReLU, 1x1 convolution, perhaps dropout, pool."""

    memory_modes = DUAL_PATH_MEMORY_MODES  # any will do: it keeps the same in all

    def forward(self, input: Tensor) -> Tensor:
        if is_traced(input):
            return self.plain_forward(input)
        try:
            return run_recomputed(read_max_pool_transition(self), input)
        except NotFusible as reason:
            return self.fall_back(input, reason)


def _read_pair(block: FusedDenseBlock, behind: nn.Module) -> Tail | None:
    """The tail that ``behind`` makes of ``block``, or None where the two must be called one by one."""
    if type(block).forward is not type(block).run_forward or not has_no_hooks(block) or not has_no_hooks(behind):
        return None
    try:
        check_no_global_hooks()
        if type(behind).forward is FusedTransition.forward:
            return read_transition(behind)
        return read_last_norm(behind)
    except NotFusible:
        return None

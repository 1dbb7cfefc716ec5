# SPDX-License-Identifier: Apache-2.0
"""The mixins that run a dense block, or a transition, as one operator."""

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdense._choices import MemoryMode
from fastdense.fusion.base import FusedModule, check_no_transforms, check_runs_here, is_traced, run_fused
from fastdense.fusion.batch_statistics import (
    StatisticsUpdate,
    group_name,
    process_group_of,
    read_update,
    synchronised,
    update_norms,
)
from fastdense.fusion.channel_order import PrependedFeatures, check_groups
from fastdense.fusion.checks import INSTANCE_NORMS, NotFusible, check_fits, check_no_global_hooks, forward_of
from fastdense.fusion.dense_layers import (
    Layer,
    Tail,
    check_leaves_input,
    check_one_kind,
    draw_factors,
    layer_weights,
    norms_of,
    read_block,
    read_last_norm,
    read_transition,
    tail_weights,
    takes_statistics,
)
from fastdense.fusion.max_pool_transition import read_max_pool_transition, run_recomputed
from fastdense.fusion.plan.frozen import Freezer
from fastdense.fusion.plan.state import state_of
from fastdense.ops import BatchStatistics
from fastdense.ops.arguments import copy_running, count_pixels, records_gradient
from fastdense.ops.dense_block import FlatBlock, flatten_block, run_flat_block, without_dropped
from fastdense.ops.dense_block_inference import is_worth_packing, run_inference
from fastdense.plain.stochastic_depth import statistics_move_if

Factor = float | Tensor


class BlockPlan(NamedTuple):
    """A dense block and its tail as the operator wants them."""

    layers: list[Layer]
    tail: Tail | None
    order: PrependedFeatures | None
    drop_rate: float
    norms: list[tuple[Any, int]]  # and where in the operator's batch statistics theirs begin
    synchronised: list[Any]  # all norms, where any may share its statistics with other processes
    update: StatisticsUpdate
    flat: FlatBlock | None  # None where the weights are made anew for every call
    per_sample: bool  # whether norms take the statistics of each sample
    has_instance_norms: bool  # that do so
    infers: bool  # whether it is one of frozen batch norms and ReLU, without dropout
    in_channels: int
    freezer: Freezer | None  # of the block's module


def plan_block(
    layers: list[Layer], tail: Tail | None, *, prepends_features: bool = False, freezer: Freezer | None = None
) -> BlockPlan:
    """Plans one operator call for a block and its tail.

    Args:
        prepends_features: the modules' channels are in the order last layer's, ... first layer's, input; those of
            the result as well. The buffer's order is the other one; weights and statistics are brought to it and back.
        freezer: of the block's module.
    """
    order, norms, in_channels = None, [], 0
    per_sample = check_one_kind(norms_of(layers, tail))
    if layers:
        first = layers[0].conv2 if layers[0].conv1 is None else layers[0].conv1
        in_channels, growth = first.weight.shape[1], layers[0].conv2.weight.shape[0]
        channels = in_channels + len(layers) * growth
        order = PrependedFeatures(growth, in_channels) if prepends_features else None
        next_offset = channels
        for index, layer in enumerate(layers):
            norms.append((layer.norm1, (len(layers) - index) * growth if prepends_features else 0))
            if layer.norm2 is not None:
                norms.append((layer.norm2, next_offset))
                next_offset += layer.conv2.weight.shape[1]
    if tail is not None:
        norms.append((tail.norm, 0))
        if layers:
            check_fits(tail.norm, "the norm behind it", channels, layers[0].conv2.weight.dim() - 2)
        if order is not None:
            check_groups([tail.norm])
    norms = [(norm, offset) for norm, offset in norms if type(norm) is not nn.Identity]
    flat = None
    if order is None and all(layer.depth is None for layer in layers):
        weights = [layer_weights(layer) for layer in layers]
        flat = flatten_block(weights, None if tail is None else tail_weights(tail))
    drop_rate = layers[0].drop_rate if layers else 0.0
    instance_norms = any(type(norm) in INSTANCE_NORMS and takes_statistics(norm) for norm, _ in norms)
    frozen = all(type(norm) is not nn.Identity and not takes_statistics(norm) for norm in norms_of(layers, tail))
    return BlockPlan(
        layers,
        tail,
        order,
        drop_rate,
        norms,
        synchronised(norms),
        read_update(norms),
        flat,
        per_sample,
        instance_norms,
        frozen and bool(layers) and flat is not None and flat.has_only_relu and drop_rate == 0,
        in_channels,
        freezer,
    )


def run_block(plan: BlockPlan, memory: MemoryMode, contiguous: bool, input: Tensor) -> Tensor:
    """The operator call, then the running statistics of all its norms."""
    check_runs_here("dense_block", input)
    if plan.per_sample and input.shape[0] == 0:
        raise NotFusible("empty batch: no statistics of samples")
    if plan.has_instance_norms and input.shape[2:].numel() == 1:
        raise NotFusible("an instance norm of one value")
    if (inferred := _infer(plan, contiguous, input)) is not None:
        return inferred
    group = process_group_of(plan.synchronised)
    factors = draw_factors(layer.depth for layer in plan.layers) if plan.flat is None else []
    out, statistics = _call(plan, factors, memory, group, contiguous, input)
    _update(plan, factors, statistics, count_pixels(input), group)
    return out


def _infer(plan: BlockPlan, contiguous: bool, input: Tensor) -> Tensor | None:
    """The output by the operator for inference; None where it cannot run, or where packing would take too long."""
    flat = plan.flat
    if flat is None or not plan.infers or input.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if records_gradient(input, (weight for weight in flat.weights if weight is not None)):
        return None
    packed = None
    if plan.freezer is not None and not torch.is_autocast_enabled("cpu"):
        packed = plan.freezer.packed(flat, input.dtype)
    if packed is None and not is_worth_packing(input):
        return None
    return run_inference(input, flat, packed, contiguous=contiguous)


def _call(
    plan: BlockPlan, factors: list[Factor], memory: MemoryMode, group: Any, contiguous: bool, input: Tensor
) -> tuple[Tensor, BatchStatistics]:
    seed = None
    if plan.drop_rate > 0:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=input.device)
    options: Any = {
        "drop_rate": plan.drop_rate,
        "seed": seed,
        "memory": memory,
        "process_group": group_name(group),
        "contiguous": contiguous,
    }
    if plan.flat is not None:
        return run_flat_block(input, plan.flat, copy_running(plan.flat.weights, plan.flat.running), **options)
    weights = [layer_weights(layer, factor) for layer, factor in zip(plan.layers, factors, strict=True)]
    tail = tail_weights(plan.tail) if plan.tail is not None else None
    order = plan.order
    if order is not None:
        weights = [order.layer(layer) for layer in weights]
        tail = order.tail(tail) if tail is not None else None
    dropped = [_is_dropped(factor) for factor in factors]
    flat = flatten_block(without_dropped(weights, [not d for d in dropped] if any(dropped) else None), tail)
    out, statistics = run_flat_block(input, flat, copy_running(flat.weights, flat.running), **options)
    if order is not None:
        statistics = order.statistics(statistics, order.in_channels + len(plan.layers) * order.growth)
        out = out if tail is not None and tail.conv is not None else order.from_buffer(out)
        out = out.contiguous() if contiguous else out
    return out, statistics


def _is_dropped(factor: Factor) -> bool:
    return not isinstance(factor, Tensor) and factor == 0


def _update(plan: BlockPlan, factors: list[Factor], statistics: BatchStatistics, count: int, group: Any) -> None:
    if plan.flat is not None:
        update_norms(plan.update, statistics, count, group)
        return
    layers = list(zip(plan.layers, factors, strict=True))
    left_out = {id(norm) for layer, f in layers if _is_dropped(f) for norm in norms_of([layer], None)}
    with contextlib.ExitStack() as stack:
        for layer, factor in layers:
            if isinstance(factor, Tensor):
                stack.enter_context(statistics_move_if(factor != 0, norms_of([layer], None)))
        moved = [(norm, offset) for norm, offset in plan.norms if id(norm) not in left_out]
        update_norms(read_update(moved), statistics, count, group)


class FusedDenseBlock(FusedModule):
    """A dense block whose layers are children ``norm1 ... conv2`` in order."""

    def forward(self, init_features: Tensor) -> Tensor:
        say_that_stem_is_plain(self, init_features)
        return run_fused(self, plan, run_block, init_features)


def say_that_stem_is_plain(block: nn.Module, input: Any) -> None:
    """Warns once where a training step calls a block, and with it the stem in front, outside of a sequence."""
    state = state_of(block)
    if state.has_stem and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_traced(input):
        state.has_stem = False
        warnings.warn(
            f"fastdense: {state.name or type(block).__name__} is called by itself, and so are the norm, ReLU and max "
            "pool before it: as plain modules they save more for backward than in one converted nn.Sequential",
            stacklevel=4,
        )


def plan(block: nn.Module) -> BlockPlan:
    """Plans the block alone."""
    return plan_block(read_block(block), None, freezer=state_of(block).freezer)


class FusedTransition(FusedModule):
    """A transition: children norm, relu, conv, pool."""

    def forward(self, input: Tensor) -> Tensor:
        return run_fused(self, _plan_transition, run_block, input)


def _plan_transition(transition: nn.Module) -> BlockPlan:
    check_leaves_input(transition, "norm", "relu", "")
    return plan_block([], read_transition(transition))


class RecomputedTransition(FusedModule):
    """A transition with a max pool: norm, activation, 1x1 convolution, perhaps dropout, pool."""

    def forward(self, input: Tensor) -> Tensor:
        return run_fused(self, read_max_pool_transition, _run_recomputed, input)


def _run_recomputed(modules: Sequence[Any], memory: MemoryMode, contiguous: bool, input: Tensor) -> Tensor:
    check_no_transforms()
    return run_recomputed(modules, input)


def read_tail(behind: nn.Module) -> Tail:
    """The tail that a module makes of the block in front of it."""
    check_no_global_hooks()
    if forward_of(behind) is FusedTransition.forward:
        return read_transition(behind)
    return read_last_norm(behind)

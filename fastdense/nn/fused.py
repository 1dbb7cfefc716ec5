# SPDX-License-Identifier: Apache-2.0
"""Mixins that run plain modules as one fused operator.

A fused class is ``class Fused(Mixin, Plain)``: it has the plain class's parameters, keys and attributes, so a plain
module becomes a fused one by a change of its class, and back. Where the operator cannot stand in for the modules, the
mixin calls the plain forward and warns once.
"""

import contextlib
import copyreg
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, fx, nn

from fastdense.nn.channel_order import NewestFirst
from fastdense.nn.recomputed import read_max_pool_transition, run_recomputed
from fastdense.nn.shared_statistics import group_name, process_group_of, total_count
from fastdense.nn.stem import Stem, read_stem
from fastdense.nn.stochastic_depth import statistics_move_if
from fastdense.nn.structure import (
    Layer,
    NotFusible,
    Tail,
    check_no_global_hooks,
    draw_factors,
    is_quiet,
    layer_weights,
    norm_weights,
    norms_of,
    read_block,
    read_last_norm,
    read_transition,
    tail_weights,
)
from fastdense.ops import BatchStatistics, dense_block, norm_relu_max_pool, update_running_stats_
from fastdense.ops.arguments import count_pixels, devices, is_exporting, missing_kernels
from fastdense.ops.dense_block import MEMORY_MODES
from fastdense.ops.dual_path import DUAL_PATH_MEMORY_MODES


class FusedModule(nn.Module):
    """Base of the mixins: memory mode, the plain class behind it, pickling, the one warning."""

    memory: str = "balanced"
    memory_modes: tuple[str, ...] = MEMORY_MODES

    def fused_run(self, behind: Sequence[nn.Module]) -> "Run | None":
        """The operator call that runs this module and some of those behind it, if there is one."""
        return None

    def plain_forward(self, input: Tensor, *others: Any) -> Tensor:
        """Runs the plain modules."""
        return plain_class(type(self)).forward(self, input, *others)

    def fall_back(self, input: Tensor, reason: NotFusible, *others: Any) -> Tensor:
        if self.__dict__.get("_fallback_reason") != str(reason):
            self.__dict__["_fallback_reason"] = str(reason)
            name = self.__dict__.get("_fused_name") or type(self).__name__
            warnings.warn(f"fastdense: {name} runs as plain modules: {reason}", stacklevel=4)
        return self.plain_forward(input, *others)

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks every module for."""
        refuse_torchscript()

    def __reduce_ex__(self, protocol: Any) -> Any:
        if "_made_by_fuse" not in type(self).__dict__:
            return super().__reduce_ex__(protocol)
        mixin, plain = type(self).__bases__
        return _new_fused, (mixin, plain), self.__dict__


class Run(NamedTuple):
    """Runs the first ``modules`` modules of a sequence as one operator; raises NotFusible where it cannot."""

    modules: int
    call: Callable[[Tensor], Tensor]


_MADE: dict[tuple[Any, Any], Any] = {}


def fused_class(mixin: Any, plain: Any) -> Any:
    """The class that runs ``plain`` by ``mixin``; library classes name theirs, others get one made."""
    for known in plain.__subclasses__():
        if issubclass(known, mixin) and known.__bases__ == (mixin, plain):
            return known
    if (mixin, plain) in _MADE:
        return _MADE[mixin, plain]
    body = {"__module__": plain.__module__, "__doc__": plain.__doc__, "_made_by_fuse": True}
    return _MADE.setdefault((mixin, plain), type(f"Fused{plain.__name__}", (mixin, plain), body))


def plain_class(fused: type[nn.Module]) -> Any:
    """The plain class behind a fused one, through library subclasses of it."""
    for base in fused.__mro__:
        if len(base.__bases__) == 2 and issubclass(base.__bases__[0], FusedModule):
            return base.__bases__[1]
    raise TypeError(f"plain_class: expected a fused class, got {fused.__name__}")


def _new_fused(mixin: type[FusedModule], plain: type[nn.Module]) -> nn.Module:
    return copyreg.__newobj__(fused_class(mixin, plain))  # type: ignore[attr-defined]


def check_memory(memory: str, modes: tuple[str, ...] = MEMORY_MODES) -> str:
    if memory not in modes:
        raise ValueError(f"fastdense: expected memory to be one of {modes}, got {memory!r}")
    return memory


def is_traced(input: Any) -> bool:
    """Whether a program for elsewhere is being recorded, by symbolic tracing or an export: of the plain modules."""
    if torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():
        refuse_torchscript()
    return isinstance(input, fx.Proxy) or is_exporting() or torch.onnx.is_in_onnx_export()


def refuse_torchscript() -> NoReturn:
    raise RuntimeError(
        "fastdense: TorchScript does not support converted modules; script or trace fastdense.restore(model), "
        "or use torch.export or torch.compile"
    )


def check_runs_here(op: str, input: Tensor) -> None:
    """Raises NotFusible where only plain modules can go in place of an operator."""
    if forward_ad._current_level >= 0:
        raise NotFusible("forward-mode derivatives go through plain modules only")
    if input.device.type not in devices(op):
        raise NotFusible(missing_kernels(input.device.type))


def run_block(
    input: Tensor, layers: list[Layer], tail: Tail | None, memory: str, *, newest_first: bool = False
) -> Tensor:
    """One operator call for a block and its tail, then the running statistics of all its norms.

    Args:
        newest_first: the modules' channels are in the order last layer's, ... first layer's, input; those of the result
            as well. The buffer's order is the other one; weights and statistics are brought to it and back.
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
    order = NewestFirst(growth, input.shape[1]) if newest_first and layers else None
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
            first = channels - norm.num_features if newest_first else 0
            norms.append((norm, next_offset if is_bottleneck else first))
        next_offset += norm.num_features if is_bottleneck else 0
    with contextlib.ExitStack() as stack:
        for layer, factor in zip(layers, factors, strict=True):
            if isinstance(factor, Tensor):
                stack.enter_context(statistics_move_if(factor != 0, norms_of([layer], None)))
        update_norms(norms, statistics, count_pixels(input), group)
    return out


def run_stem(stem: Stem, input: Tensor) -> Tensor:
    """One operator call for a norm, ReLU and max pool, where it knows the pool; else they are run again in backward."""
    try:
        check_runs_here("norm_relu_max_pool", input)
        group = process_group_of([stem.norm])
        if stem.pool is None or not stem.takes(input):
            raise NotFusible("the operator knows no such pool or mix of types")
        if input.numel() == 0 and group is None:
            raise NotFusible("a batch of nothing has no statistics")
    except NotFusible:
        return run_recomputed(stem.modules, input)
    out, statistics = norm_relu_max_pool(input, norm_weights(stem.norm), *stem.pool, process_group=group_name(group))
    update_norms([(stem.norm, 0)], statistics, count_pixels(input), group)
    return out


def update_norms(norms: Sequence[tuple[Any, int]], statistics: BatchStatistics, count: int, group: Any) -> None:
    """Moves the running statistics of the norms in training, whose batch statistics start at the given offsets.

    Args:
        count: values behind each mean in this process.
        group: the processes that share the statistics, or None.
    """
    norms = [
        (norm, offset)
        for norm, offset in norms
        if norm.training and norm.track_running_stats and norm.running_mean is not None
    ]
    if norms:
        update_running_stats_(
            [norm.running_mean for norm, _ in norms],
            [norm.running_var for norm, _ in norms],
            [norm.num_batches_tracked for norm, _ in norms],
            statistics.mean.detach(),
            statistics.var.detach(),
            [offset for _, offset in norms],
            [norm.momentum for norm, _ in norms],
            count,
            total_count(count, group, statistics.mean.device),
        )


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


class FusedSequential(FusedModule):
    """A sequence in which modules that belong together run as one operator.

    A dense block runs with the transition or norm behind it: the norm's statistics are those of the block, its gradient
    joins the block's, and no feature map of the block's size is made twice. Dual path blocks in a row run as a stage,
    blocks of SRDenseNet in a row on one buffer. So do the norm, ReLU and max pool of a stem. Modules with hooks run one
    by one.
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_traced(input):
            return self.plain_forward(input)
        modules = list(self.__dict__["_modules"].values())
        at = 0
        while at < len(modules):
            module = modules[at]
            run = module.fused_run(modules[at + 1 :]) if isinstance(module, FusedModule) else None
            if run is not None:
                try:
                    input = run.call(input)
                    at += run.modules
                    continue
                except NotFusible:
                    pass  # one by one; they fall back, with their own warnings
            stem = read_stem(modules[at:])
            if stem is not None:
                input = run_stem(stem, input)
                at += len(stem.modules)
                continue
            input = module(input)
            at += 1
        return input


def _read_pair(block: FusedDenseBlock, behind: nn.Module) -> Tail | None:
    """The tail that ``behind`` makes of ``block``, or None where the two must be called one by one."""
    if type(block).forward is not type(block).run_forward or not is_quiet(block) or not is_quiet(behind):
        return None
    try:
        check_no_global_hooks()
        if type(behind).forward is FusedTransition.forward:
            return read_transition(behind)
        return read_last_norm(behind)
    except NotFusible:
        return None

# SPDX-License-Identifier: Apache-2.0
"""The mixin that runs modules of a sequence that belong together as one operator."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdense.fusion.base import (
    FusedModule,
    check_no_transforms,
    fall_back,
    find_wrapped,
    gives_contiguous,
    is_traced,
    run_plain,
)
from fastdense.fusion.checks import CONVS, NORMS, SAMPLE_NORMS, NotFusible, check_no_hooks, forward_of
from fastdense.fusion.dense_block import BlockPlan, FusedDenseBlock, plan_block, read_tail, run_block
from fastdense.fusion.dense_layers import is_activation, read_block
from fastdense.fusion.dual_path import FusedDualPathBlock, StagePlan, StagesPlan, plan_stages, run_stages
from fastdense.fusion.inferred_block import FusedInferredBlock
from fastdense.fusion.inferred_layers import read_inferred_block
from fastdense.fusion.max_pool_transition import POOLS
from fastdense.fusion.plan.code import find_sources
from fastdense.fusion.plan.kept import IN_TURN, Kept, check_compiled_code, check_function_modes, check_sources, keep
from fastdense.fusion.plan.state import memory_of, plain_class, state_of
from fastdense.fusion.residual_dense_block import FusedSRDenseBlock, plan_growing, run_growing
from fastdense.fusion.stem import is_conv_norm_act, read_stem, run_stem


class Run(NamedTuple):
    """Runs the first ``modules`` modules of a row as one operator; raises NotFusible where it cannot."""

    modules: int
    call: Callable[[bool, Tensor], Any]
    plans: tuple[BlockPlan | StagePlan, ...] = ()  # of a dense block and what reads it, or of dual path stages


class FusedSequential(FusedModule):
    """A sequence in which modules that belong together run as one operator.

    A dense block runs with the transition or norm behind it: the norm's statistics are those of the block, its gradient
    joins the block's, and no feature map of the block's size is made twice. Dual path blocks in a row run as a stage,
    blocks of SRDenseNet in a row on one buffer. So do the norm, ReLU and max pool of a stem, and its convolution where
    the block behind is run again in backward. Modules with hooks run one by one.
    """

    def forward(self, input: Tensor) -> Tensor:
        if wrapped := find_wrapped(input):
            return torch.overrides.handle_torch_function(type(self).forward, wrapped, self, input)
        if is_traced(input):
            return run_plain(self, input)
        try:
            _check_own_code(self)
        except NotFusible as reason:
            return fall_back(self, reason, input)
        modules = list(self.__dict__["_modules"].values())
        at, contiguous = 0, None  # as what the first operator reads tells
        while at < len(modules):
            row = _row(modules, at)
            if row:
                try:
                    run = _run_of(self, at, row)
                    if contiguous is None:
                        contiguous = gives_contiguous(input)
                    input = run.call(contiguous and at + run.modules == len(modules), input)
                    at += run.modules
                    continue
                except NotFusible:
                    pass  # one by one; they fall back, with their own warnings
            if isinstance(modules[at], FusedModule):
                state_of(modules[at]).has_stem = False  # it has run here
            elif _is_in_front_of_stem(self, modules, at, input):
                if contiguous is None:
                    contiguous = gives_contiguous(input)
                input = input.contiguous(memory_format=torch.channels_last)
            input = modules[at](input)
            at += 1
        return input.contiguous() if contiguous and isinstance(input, Tensor) else input


def runs_of(sequence: nn.Module) -> Iterator[tuple[Sequence[nn.Module], Run]]:
    """What a sequence runs as one operator: dense blocks with what reads them, and dual path blocks in a row."""
    try:
        _check_own_code(sequence)
    except NotFusible:
        return
    modules = list(sequence.__dict__["_modules"].values())
    at = 0
    while at < len(modules):
        row = _row(modules, at) if isinstance(modules[at], FusedDenseBlock | FusedDualPathBlock) else ()
        end = at + 1
        if row:
            try:
                run = _run_of(sequence, at, row)
                end = at + run.modules
                yield modules[at:end], run
            except NotFusible:
                pass
        at = end


def _check_own_code(sequence: nn.Module) -> None:
    """Raises NotFusible where the code of the sequence, or of a stem in it, is not what it was."""
    if torch.compiler.is_compiling():
        return
    check_function_modes()
    state = state_of(sequence)
    if state.kept is None or not state.kept.still_holds():
        stems = (*CONVS, *NORMS, *SAMPLE_NORMS, *POOLS)
        children = [c for child in sequence.children() for c in (child, *_inner(child))]
        own = [type(child) for child in children if isinstance(child, stems) or is_activation(child) or _inner(child)]
        state.kept = find_sources(frozenset([plain_class(type(sequence)), *own]))
    check_sources(state.kept)


def _inner(module: nn.Module) -> list[nn.Module]:
    """The modules of a stem's convolution, norm and activation in one module."""
    return list(module.children()) if is_conv_norm_act(module) else []


def _row(modules: list[nn.Module], at: int) -> tuple[nn.Module, ...]:
    """The modules that may run as one, the last of which may be what ends them; none for what runs by itself."""
    first = modules[at]
    forward = forward_of(first)
    end = at + 1
    if forward in (FusedDenseBlock.forward, FusedInferredBlock.forward):
        end += 1
    elif forward in (FusedDualPathBlock.forward, FusedSRDenseBlock.forward):
        while end < len(modules) and forward_of(modules[end]) is forward:
            end += 1
    elif isinstance(first, (*NORMS, *SAMPLE_NORMS)):
        while end < at + 3 and end < len(modules) and (type(modules[end]) in POOLS or is_activation(modules[end])):
            end += 1
    elif is_conv_norm_act(first):
        end += end < len(modules) and type(modules[end]) in POOLS
    elif type(first) in CONVS and end < len(modules) and isinstance(modules[end], (*NORMS, *SAMPLE_NORMS)):
        end += len(_row(modules, end))
        if end == at + 1 or not _is_recomputed(modules[end:]):
            return ()
    return tuple(modules[at:end]) if at + 1 < end <= len(modules) else ()


def _is_in_front_of_stem(sequence: nn.Module, modules: list[nn.Module], at: int, input: Any) -> bool:
    """Whether a convolution is to have channels-last images: that of a stem which fused modules follow.

    Copying an image is cheap, and the pool is faster with channels innermost. With gradients the convolution would keep
    the copy. Where anybody else sees what the convolution or the stem makes, it has the format of plain modules.
    """
    conv = modules[at]
    if type(conv) is not nn.Conv2d or not isinstance(input, Tensor) or torch.is_grad_enabled():
        return False
    if input.dim() != 4 or input.device.type != "cpu" or not input.is_contiguous() or torch.compiler.is_compiling():
        return False
    behind = modules[at + 1 : at + 2]
    if not behind or not isinstance(behind[0], NORMS) or behind[0].training or not (row := _row(modules, at + 1)):
        return False
    try:
        check_no_transforms()
        check_no_hooks(conv, "it")
        end = at + 1 + _run_of(sequence, at + 1, row).modules
    except NotFusible:
        return False
    return end < len(modules) and isinstance(modules[end], FusedModule)


def _is_recomputed(behind: list[nn.Module]) -> bool:
    """Whether a stem is to be run again: it goes with the dense block behind it."""
    return bool(behind) and isinstance(behind[0], FusedDenseBlock) and memory_of(behind[0]) == "recompute"


def _run_of(sequence: nn.Module, at: int, row: tuple[nn.Module, ...]) -> Run:
    """What a row runs as, read anew only where something has changed."""
    if torch.compiler.is_compiling():
        check_compiled_code()
        return _read(row)
    steps = state_of(sequence).steps
    with IN_TURN:
        kept: Kept[Run] | None = steps.get(at)
        if kept is None or not kept.still_holds(row):
            kept = keep(row, lambda: _read(row), kept)
            steps[at] = kept.to_store()
    return kept.get()


def _read(row: Sequence[nn.Module]) -> Run:
    first = row[0]
    memory = memory_of(first)
    if isinstance(first, FusedDenseBlock):
        pair = _plan_pair(first, row[1])
        return Run(2, partial(run_block, pair, memory), (pair,))
    if isinstance(first, FusedDualPathBlock):
        stages = plan_stages(row)
        plans = tuple(stages.stages) if isinstance(stages, StagesPlan) else ()
        return Run(stages.modules, partial(run_stages, stages, memory), plans)
    if isinstance(first, FusedSRDenseBlock):
        blocks = plan_growing(row)
        return Run(blocks.blocks, partial(run_growing, blocks, memory))
    stem = read_stem(row)
    return Run(stem.length, partial(run_stem, stem))


def _plan_pair(block: nn.Module, behind: nn.Module) -> BlockPlan:
    """A dense block and what reads it."""
    check_no_hooks(block, "it")
    check_no_hooks(behind, "what follows it")
    tail = read_tail(behind)
    if isinstance(block, FusedInferredBlock):
        found = read_inferred_block(block)
        return plan_block(
            found.layers, tail, prepends_features=found.prepends_features, freezer=state_of(block).freezer
        )
    return plan_block(read_block(block), tail, freezer=state_of(block).freezer)

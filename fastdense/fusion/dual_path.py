# SPDX-License-Identifier: Apache-2.0
"""The mixin that runs dual path blocks as one operator a stage; see :mod:`fastdense.fusion.base`.

Blocks that no operator can run go on a shared buffer where the memory mode is one of those that run modules twice.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdense._choices import SHARED_BUFFER_MODES, DualPathMemoryMode
from fastdense.fusion.base import FusedModule, check_no_transforms, check_runs_here, run_fused, run_plain
from fastdense.fusion.batch_statistics import (
    StatisticsUpdate,
    group_name,
    process_group_of,
    read_update,
    synchronised,
    update_norms,
)
from fastdense.fusion.checks import NotFusible, has_no_hooks
from fastdense.fusion.dense_layers import draw_factors, takes_statistics
from fastdense.fusion.dual_path_layers import (
    DualPath,
    NormConv,
    block_weights,
    fit_together,
    hands_on_pairs,
    projection_weights,
    read_dual_path_block,
    split_of,
)
from fastdense.fusion.plan.frozen import Freezer
from fastdense.fusion.plan.kept import IN_TURN
from fastdense.fusion.plan.state import memory_of, state_of
from fastdense.fusion.shared_buffer.dual_path import (
    Stage,
    check_stages,
    is_head,
    plan_stage,
    read_shared_dual_path,
    run_stage,
)
from fastdense.fusion.shared_buffer.layers import about_shared_buffer
from fastdense.fusion.shared_buffer.reruns import needs_gradient
from fastdense.ops import BatchStatistics
from fastdense.ops.arguments import copy_running, count_pixels, records_gradient
from fastdense.ops.dual_path import FlatStage, flatten_stage, run_flat_stage, run_stage_inference
from fastdense.plain.stochastic_depth import statistics_move_if

# Both paths in one tensor, or as a tuple of two tensors; the library's own blocks know the former only.
Paths = Any
Factor = float | Tensor


class RowPlan(NamedTuple):
    """Blocks without one that may be left out among them, as the operator wants them."""

    blocks: list[DualPath]
    factors: list[Factor]
    flat: FlatStage
    in_front: list[tuple[Any, int]]  # norms in front of the stride, and where their batch statistics begin
    behind: list[tuple[Any, int]]
    updates: tuple[StatisticsUpdate, StatisticsUpdate, StatisticsUpdate]  # in front, behind, all


class StagePlan(NamedTuple):
    """A stage; ``row`` is None where it is planned in each pass.

    That is where stochastic depth draws which blocks are computed, and where the weights of two convolutions are
    joined: a plan is kept, and a joined weight would stay what it was before the optimizer's step.
    """

    blocks: list[DualPath]
    synchronised: list[Any]
    row: RowPlan | None
    freezer: Freezer  # of the first block's module

    @property
    def flat(self) -> FlatStage | None:
        return self.row.flat if self.row is not None else None

    @property
    def infers(self) -> bool:
        """Whether all norms are frozen, and what is computed the same in each pass."""
        return self.row is not None and not any(takes_statistics(part.norm) for b in self.blocks for part in _parts(b))

    @property
    def norms(self) -> list[tuple[Any, int]]:
        """Those of all blocks, and where their batch statistics begin."""
        return self.row.in_front + self.row.behind if self.row is not None else []

    @property
    def in_channels(self) -> int:
        return self.blocks[0].a.norm.num_features


class StagesPlan(NamedTuple):
    """Stages in a row; ``split`` is where the last one's paths are parted, if the plain blocks hand on a pair."""

    stages: list[StagePlan]
    split: int | None

    @property
    def modules(self) -> int:
        """The number of blocks."""
        return sum(len(stage.blocks) for stage in self.stages)


class SharedPlan(NamedTuple):
    """Blocks in a row that no operator runs, and why; as plain modules they run on a buffer for each stage."""

    blocks: tuple[nn.Module, ...]
    stages: list[Stage] | None  # None where their modules run once
    split: int | None
    reason: str

    @property
    def modules(self) -> int:
        """The number of blocks."""
        return len(self.blocks)


class FusedDualPathBlock(FusedModule):
    """A dual path block; a row of them in a :class:`fastdense.fusion.sequential.FusedSequential` runs as stages."""

    def forward(self, x: Paths) -> Paths:
        return run_fused(self, plan, run_stages, x)


def plan(block: nn.Module) -> StagesPlan | SharedPlan:
    return plan_stages([block])


def plan_stages(row: Sequence[Any]) -> StagesPlan | SharedPlan:
    """Plans the blocks that a row of modules begins with, as far as they run alike."""
    if len(row) > 1 and not has_no_hooks(row[0]):
        raise NotFusible("it has hooks")
    try:
        return _plan_fused(row)
    except NotFusible as reason:
        return _plan_shared(row, str(reason))


def _alike(row: Sequence[Any]) -> Iterator[Any]:
    """The modules that a row begins with, as long as what is around them has no part in how they run."""
    first = row[0]
    for module in row:
        if memory_of(module) != memory_of(first) or hands_on_pairs(module) != hands_on_pairs(first):
            return
        if module is not first and not has_no_hooks(module):
            return
        yield module


def _plan_fused(row: Sequence[Any]) -> StagesPlan:
    """Raises NotFusible where the first block cannot be fused."""
    first = row[0]
    stages: list[list[DualPath]] = []
    for module in _alike(row):
        try:
            block = read_dual_path_block(module)
        except NotFusible:
            if module is first:
                raise
            break  # the row ends in front of what cannot be fused
        if stages and fit_together(stages[-1], block):
            stages[-1].append(block)
        else:
            stages.append([block])
    ends = list(itertools.accumulate(map(len, stages)))
    plans = [_plan_stage(blocks, row[end - len(blocks)]) for blocks, end in zip(stages, ends, strict=True)]
    return StagesPlan(plans, split_of(row[ends[-1] - 1]))


def _plan_shared(row: Sequence[Any], reason: str) -> SharedPlan:
    """Plans blocks of which no operator runs the first; raises NotFusible where its modules cannot run twice either."""
    first, memory = row[0], memory_of(row[0])
    shares = memory in SHARED_BUFFER_MODES
    if torch.compiler.is_compiling():  # the compiler chooses what to save
        if not shares:
            raise NotFusible(reason)
        return SharedPlan((first,), None, split_of(first), reason)
    rows: list[list[nn.Module]] = []
    for module in _alike(row if shares else row[:1]):
        try:
            read_shared_dual_path(module)
        except NotFusible as why_not:
            if module is first:
                raise NotFusible(about_shared_buffer(reason, str(why_not), memory)) from None
            break
        if module is not first and _is_fusible(module):
            break
        if rows and not is_head(module) and module.num_1x1_c == rows[-1][0].num_1x1_c:
            rows[-1].append(module)
        else:
            rows.append([module])
    if not shares:
        raise NotFusible(about_shared_buffer(reason, None, memory))
    blocks = tuple(module for blocks in rows for module in blocks)
    return SharedPlan(blocks, [plan_stage(blocks) for blocks in rows], split_of(blocks[-1]), reason)


def _is_fusible(module: nn.Module) -> bool:
    try:
        read_dual_path_block(module)
    except NotFusible:
        return False
    return True


def _plan_stage(blocks: list[DualPath], first: nn.Module) -> StagePlan:
    norms = [(part.norm, 0) for block in blocks for part in _parts(block)]
    draws = any(block.depth is not None for block in blocks)
    joins = any(len(part.convs) > 1 for block in blocks for part in _parts(block))
    row = None if draws or joins else _plan_row(blocks, [1.0] * len(blocks))
    return StagePlan(blocks, synchronised(norms), row, state_of(first).freezer)


def _plan_row(blocks: list[DualPath], factors: list[Factor]) -> RowPlan:
    head = blocks[0]
    flat = flatten_stage(
        [block_weights(block, factor) for block, factor in zip(blocks, factors, strict=True)],
        projection_weights(head.projection) if head.projection is not None else None,
        head.residual_channels,
        head.stride,
    )
    in_front: list[tuple[Any, int]] = []
    behind: list[tuple[Any, int]] = []
    offset = 0
    for block in blocks:
        for part, norms in ((block.projection, in_front), (block.a, in_front), (block.b, in_front), (block.c, behind)):
            if part is not None:
                (norms if block is head else behind).append((part.norm, offset))
                offset += part.norm.num_features
    updates = (read_update(in_front), read_update(behind), read_update(in_front + behind))
    return RowPlan(blocks, factors, flat, in_front, behind, updates)


def run_stages(plan: StagesPlan | SharedPlan, memory: DualPathMemoryMode, contiguous: bool, x: Paths) -> Paths:
    """Stages one after the other; what keeps any of them from being fused is found before the first has run."""
    if isinstance(plan, SharedPlan):
        with contextlib.nullcontext() if torch.compiler.is_compiling() else IN_TURN:
            return _run_shared(plan, contiguous, x)
    if isinstance(x, tuple):
        x = torch.cat(x, 1)
    check_runs_here("dual_path_stage", x)
    if memory == "reversible" and _computes_in(x) not in (torch.float32, torch.float64):
        raise NotFusible(f'memory="reversible" supports float32 and float64, got {_computes_in(x)}')
    groups = [process_group_of(stage.synchronised) for stage in plan.stages]
    for stage, group in zip(plan.stages, groups, strict=True):
        x = _run_stage(x, stage, memory, contiguous and stage is plan.stages[-1] and plan.split is None, group)
    return _parted(x, plan.split, contiguous)


def _parted(x: Tensor, split: int | None, contiguous: bool) -> Paths:
    """Both paths as plain blocks hand them on."""
    if split is None:
        return x
    parts = x[:, :split], x[:, split:]
    return tuple(part.contiguous() for part in parts) if contiguous else parts


def _run_shared(plan: SharedPlan, contiguous: bool, x: Paths) -> Paths:
    """Blocks as plain modules: twice, on a buffer for each stage, where there is something to save for backward."""
    paths = x if isinstance(x, tuple) else (x,)
    parameters = [p for stage in plan.stages or () for p in stage.parameters]
    once = plan.stages is None or not any(needs_gradient(path, parameters) for path in paths)
    if once or any(path.is_inference() for path in paths):
        for block in plan.blocks:
            x = run_plain(block, x)
        return x
    stages = plan.stages or []
    check_no_transforms()
    check_stages(stages)
    x = torch.cat(x, 1) if isinstance(x, tuple) else x
    for stage in stages:
        x = run_stage(stage, x)
    return _parted(x, plan.split, contiguous)


def _parts(block: DualPath) -> list[NormConv]:
    return [part for part in (block.projection, block.a, block.b, block.c) if part is not None]


def _run_stage(x: Tensor, stage: StagePlan, memory: DualPathMemoryMode, contiguous: bool, group: Any) -> Tensor:
    """One operator call for all blocks, or for each row of blocks between those that stochastic depth leaves out."""
    if stage.row is not None:
        if (inferred := _infer(x, stage, stage.row.flat, contiguous)) is not None:
            return inferred
        return _run_row(x, stage.row, memory, contiguous, group)
    blocks = stage.blocks
    factors = draw_factors(block.depth for block in blocks)
    begin = 0
    for index, factor in enumerate([*factors, 0.0]):
        if isinstance(factor, Tensor) or factor != 0:
            continue
        if index > begin:
            row = _plan_row(blocks[begin:index], factors[begin:index])
            x = _run_row(x, row, memory, contiguous and index == len(blocks), group)
        if index < len(blocks):
            x = _left_out(x, blocks[index])
        begin = index + 1
    return x.contiguous() if contiguous else x


def _infer(x: Tensor, stage: StagePlan, flat: FlatStage, contiguous: bool) -> Tensor | None:
    """The output by weights that :func:`fastdense.freeze` keeps; None where there are none, or they are of no use."""
    if stage.freezer.kept is None or not stage.infers or x.device.type != "cpu":
        return None
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return None
    if records_gradient(x, (weight for weight in flat.weights if weight is not None)):
        return None
    packed = stage.freezer.packed(flat, x.dtype)
    return None if packed is None else run_stage_inference(x, flat, packed, contiguous=contiguous)


def _left_out(x: Tensor, block: DualPath) -> Tensor:
    """A block without what it computes: both paths, at the head of a stage projected, and zeros behind them."""
    if block.projection is not None:
        (conv,) = block.projection.convs
        x = conv(F.relu(block.projection.norm(x)))
    return torch.cat([x, x.new_zeros(x.shape[0], block.growth, *x.shape[2:])], 1)


def _run_row(x: Tensor, row: RowPlan, memory: DualPathMemoryMode, contiguous: bool, group: Any) -> Tensor:
    """One operator call, then the running statistics of all norms."""
    weights = copy_running(row.flat.weights, row.flat.running)
    out, statistics = run_flat_stage(
        x, row.flat, weights, memory=memory, process_group=group_name(group), contiguous=contiguous
    )
    in_front, behind, everything = row.updates
    with contextlib.ExitStack() as stack:
        drawn = [(block, f) for block, f in zip(row.blocks, row.factors, strict=True) if isinstance(f, Tensor)]
        for block, factor in drawn:
            norms = [part.norm for part in (block.a, block.b, block.c)]
            stack.enter_context(statistics_move_if(factor != 0, norms))
        if drawn:  # the norms have other buffers now
            in_front, behind = read_update(row.in_front), read_update(row.behind)
            everything = read_update(row.in_front + row.behind)
        _move(x, out, in_front, behind, everything, statistics, group)
    return out


def _move(
    x: Tensor,
    out: Tensor,
    in_front: StatisticsUpdate,
    behind: StatisticsUpdate,
    everything: StatisticsUpdate,
    statistics: BatchStatistics,
    group: Any,
) -> None:
    in_pixels, pixels = count_pixels(x), count_pixels(out)
    if in_pixels == pixels:
        update_norms(everything, statistics, pixels, group)
    else:
        update_norms(in_front, statistics, in_pixels, group)
        update_norms(behind, statistics, pixels, group)


def _computes_in(x: Tensor) -> torch.dtype:
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype

# SPDX-License-Identifier: Apache-2.0
"""The mixin that runs dual path blocks as one operator a stage; see :mod:`fastdense.fusion.base`."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdense._choices import DUAL_PATH_MEMORY_MODES, DualPathMemoryMode
from fastdense.fusion.base import FusedModule, Run, check_runs_here, is_traced
from fastdense.fusion.batch_statistics import group_name, process_group_of, update_norms
from fastdense.fusion.checks import NotFusible, has_no_hooks
from fastdense.fusion.dense_layers import draw_factors
from fastdense.fusion.dual_path_layers import (
    DualPath,
    NormConv,
    block_weights,
    fit_together,
    hands_on_pairs,
    projection_weights,
    read_dual_path_block,
)
from fastdense.ops import BatchStatistics, dual_path_stage
from fastdense.ops.arguments import count_pixels
from fastdense.plain.stochastic_depth import statistics_move_if

# Both paths in one tensor, or as a tuple of two tensors; the library's own blocks know the former only.
Paths = Any


class FusedDualPathBlock(FusedModule):
    """A dual path block; a row of them in a :class:`fastdense.fusion.sequential.FusedSequential` runs as stages."""

    memory_modes = DUAL_PATH_MEMORY_MODES

    def forward(self, x: Paths) -> Paths:
        if is_traced(x):
            return self.plain_forward(x)
        try:
            return self._hand_on(run_stages(_joined(x), [[read_dual_path_block(self)]], self.memory))
        except NotFusible as reason:
            return self.fall_back(x, reason)

    def fused_run(self, behind: Sequence[nn.Module]) -> Run | None:
        stages: list[list[DualPath]] = []
        try:
            for module in (self, *behind):
                if type(module).forward is not FusedDualPathBlock.forward or module.memory != self.memory:
                    break
                if not has_no_hooks(module) or hands_on_pairs(module) != hands_on_pairs(self):
                    break
                block = read_dual_path_block(module)
                if stages and fit_together(stages[-1], block):
                    stages[-1].append(block)
                else:
                    stages.append([block])
        except NotFusible:
            pass  # the row ends in front of what cannot be fused
        if not stages:
            return None

        return Run(sum(map(len, stages)), lambda x: self._hand_on(run_stages(_joined(x), stages, self.memory)))

    def _hand_on(self, out: Tensor) -> Paths:
        """Both paths as the plain block returns them."""
        residual: Any = self.num_1x1_c
        return (out[:, :residual], out[:, residual:]) if hands_on_pairs(self) else out


def _joined(x: Paths) -> Tensor:
    return torch.cat(x, 1) if isinstance(x, tuple) else x


Factor = float | Tensor


def run_stages(x: Tensor, stages: list[list[DualPath]], memory: DualPathMemoryMode) -> Tensor:
    """Stages one after the other; what keeps any of them from being fused is found before the first has run."""
    check_runs_here("dual_path_stage", x)
    if memory == "reversible" and _computes_in(x) not in (torch.float32, torch.float64):
        raise NotFusible(f'memory="reversible" is for float32 and float64, not for {_computes_in(x)}')
    groups = [process_group_of(part.norm for block in blocks for part in _parts(block)) for blocks in stages]
    for blocks, group in zip(stages, groups, strict=True):
        x = _run_stage(x, blocks, memory, group)
    return x


def _parts(block: DualPath) -> list[NormConv]:
    return [part for part in (block.projection, block.a, block.b, block.c) if part is not None]


def _run_stage(x: Tensor, blocks: list[DualPath], memory: DualPathMemoryMode, group: Any) -> Tensor:
    """One operator call for all blocks, or for each row of blocks between those that stochastic depth leaves out."""
    factors = draw_factors(block.depth for block in blocks)
    begin = 0
    for index, factor in enumerate([*factors, 0.0]):
        if isinstance(factor, Tensor) or factor != 0:
            continue
        if index > begin:
            x = _run_row(x, blocks[begin:index], factors[begin:index], memory, group)
        if index < len(blocks):
            x = _left_out(x, blocks[index])
        begin = index + 1
    return x


def _left_out(x: Tensor, block: DualPath) -> Tensor:
    """A block without what it computes: both paths, at the head of a stage projected, and zeros behind them."""
    if block.projection is not None:
        (conv,) = block.projection.convs
        x = conv(F.relu(block.projection.norm(x)))
    return torch.cat([x, x.new_zeros(x.shape[0], block.growth, *x.shape[2:])], 1)


def _run_row(
    x: Tensor, blocks: list[DualPath], factors: list[Factor], memory: DualPathMemoryMode, group: Any
) -> Tensor:
    """One operator call, then the running statistics of all norms."""
    projection = blocks[0].projection
    out, statistics = dual_path_stage(
        x,
        [block_weights(block, factor) for block, factor in zip(blocks, factors, strict=True)],
        residual_channels=blocks[0].residual_channels,
        projection=projection_weights(projection) if projection is not None else None,
        stride=blocks[0].stride,
        memory=memory,
        process_group=group_name(group),
    )
    with contextlib.ExitStack() as stack:
        for block, factor in zip(blocks, factors, strict=True):
            if isinstance(factor, Tensor):
                norms = [part.norm for part in (block.a, block.b, block.c)]
                stack.enter_context(statistics_move_if(factor != 0, norms))
        _update_running_stats(x, out, blocks, statistics, group)
    return out


def _computes_in(x: Tensor) -> torch.dtype:
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _update_running_stats(
    x: Tensor, out: Tensor, blocks: list[DualPath], statistics: BatchStatistics, group: Any
) -> None:
    in_front: list[tuple[Any, int]] = []  # of the stride
    behind: list[tuple[Any, int]] = []
    offset = 0
    for block in blocks:
        for part, norms in ((block.projection, in_front), (block.a, in_front), (block.b, in_front), (block.c, behind)):
            if part is not None:
                (norms if block is blocks[0] else behind).append((part.norm, offset))
                offset += part.norm.num_features
    in_pixels, pixels = count_pixels(x), count_pixels(out)
    if in_pixels == pixels:
        in_front, behind = [], in_front + behind
    update_norms(in_front, statistics, in_pixels, group)
    update_norms(behind, statistics, pixels, group)

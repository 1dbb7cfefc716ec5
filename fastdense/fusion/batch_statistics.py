# SPDX-License-Identifier: Apache-2.0
"""Statistics of fused norms: shared between processes, and the running statistics they move."""

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdense.fusion.checks import INSTANCE_NORMS, NotFusible
from fastdense.ops import BatchStatistics, update_running_stats_


def process_group_of(norms: Iterable[Any]) -> Any:
    """The process group of all norms that take batch statistics, or None where every process takes its own.

    Raises:
        NotFusible: if they differ; a block takes the statistics of a channel once for all norms that read it.
    """
    groups = {_group_of(norm) for norm in norms if norm.training or getattr(norm, "running_mean", None) is None}
    if len(groups) > 1:
        raise NotFusible("its norms belong to different process groups")
    return groups.pop() if groups else None


def synchronised(norms: Iterable[tuple[Any, int]]) -> list[Any]:
    """All norms if any of them is a SyncBatchNorm, else none: those need not be asked at every call."""
    found = [norm for norm, _ in norms]
    return found if any(isinstance(norm, nn.SyncBatchNorm) for norm in found) else []


def _group_of(norm: Any) -> Any:
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group if norm.process_group is not None else dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def group_name(group: Any) -> str:
    return "" if group is None else group.group_name


def total_count(count: int, group: Any, device: torch.device) -> Tensor | None:
    """``[1]``, float64: sum of ``count`` over the processes of a group."""
    if group is None:
        return None
    total = torch.full((1,), float(count), dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return total


class StatisticsUpdate(NamedTuple):
    """The running statistics that a step moves, and where their norms' batch statistics begin."""

    running_mean: list[Tensor]
    running_var: list[Tensor]
    num_batches_tracked: list[Tensor]
    offsets: list[int]
    momentum: list[float | None]


def read_update(norms: Iterable[tuple[Any, int]]) -> StatisticsUpdate:
    """Of the norms in training, whose batch statistics start at the given offsets."""
    moved = [(norm, offset) for norm, offset in norms if _moves(norm)]
    return StatisticsUpdate(
        [norm.running_mean for norm, _ in moved],
        [norm.running_var for norm, _ in moved],
        [_counter(norm) for norm, _ in moved],
        [offset for _, offset in moved],
        [norm.momentum for norm, _ in moved],
    )


def _moves(norm: Any) -> bool:
    if not norm.training or getattr(norm, "running_mean", None) is None:
        return False
    # An instance norm without momentum has no average over batches: its statistics stay.
    return norm.track_running_stats and not (isinstance(norm, INSTANCE_NORMS) and norm.momentum is None)


def _counter(norm: Any) -> Tensor:
    """``num_batches_tracked``; that of an instance norm stays 0, and another number is counted up."""
    if isinstance(norm, INSTANCE_NORMS):
        return torch.zeros((), dtype=torch.int64, device=norm.running_mean.device)  # type: ignore[union-attr]
    return norm.num_batches_tracked


def update_norms(update: StatisticsUpdate, statistics: BatchStatistics, count: int, group: Any) -> None:
    """Moves running statistics: those of instance norms by the average over samples.

    Args:
        count: values behind each mean of the batch in this process.
        group: the processes that share the statistics, or None.
    """
    if update.running_mean:
        if statistics.mean.dim() == 2:
            count //= statistics.mean.shape[0]
            statistics = BatchStatistics(statistics.mean.mean(0), statistics.var.mean(0))
        with _as_plain_norms_move(update):
            update_running_stats_(
                update.running_mean,
                update.running_var,
                update.num_batches_tracked,
                statistics.mean.detach(),
                statistics.var.detach(),
                update.offsets,
                update.momentum,
                count,
                total_count(count, group, statistics.mean.device),
            )


def _as_plain_norms_move(update: StatisticsUpdate) -> AbstractContextManager[None]:
    """Within it, running statistics keep their versions, as when torch's batch norm moves them.

    It saves them for its backward pass, which would else raise where the same norm ran plain in one forward pass and
    fused in the next.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    moved = (t for t in (*update.running_mean, *update.running_var) if not t.is_inference())
    return torch.autograd._unsafe_preserve_version_counter(tuple(moved))

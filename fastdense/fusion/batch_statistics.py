# SPDX-License-Identifier: Apache-2.0
"""Batch statistics of fused norms: shared between processes, and the running statistics they move."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdense.fusion.checks import NotFusible
from fastdense.ops import BatchStatistics, update_running_stats_


def process_group_of(norms: Iterable[Any]) -> Any:
    """The process group of all norms that take batch statistics, or None where every process takes its own.

    Raises:
        NotFusible: if they differ; a block takes the statistics of a channel once for all norms that read it.
    """
    groups = {_group_of(norm) for norm in norms if norm.training or norm.running_mean is None}
    if len(groups) > 1:
        raise NotFusible("its norms share batch statistics with different processes")
    return groups.pop() if groups else None


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

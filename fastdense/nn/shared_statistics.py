# SPDX-License-Identifier: Apache-2.0
"""Which processes the norms of a block share batch statistics with: those of :class:`torch.nn.SyncBatchNorm`."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdense.nn.structure import NotFusible


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

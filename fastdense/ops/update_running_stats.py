# SPDX-License-Identifier: Apache-2.0
"""Running statistics of all norms of a block, updated once per step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdense.ops.fakes import register_fake


def update_running_stats_(
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    num_batches_tracked: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    offsets: Sequence[int],
    momentum: Sequence[float | None],
    count: int,
    total_count: Tensor | None = None,
) -> None:
    """Updates running statistics with those of the batch, in place.

    ``running = running + f * (batch - running)`` with ``f = momentum``, or ``1 / num_batches_tracked`` after it was
    incremented where momentum is None; the variance that enters is the unbiased one, ``var * M / (M - 1)``.

    Args:
        running_mean: one ``[C_i]`` per norm, floating point.
        running_var: likewise.
        num_batches_tracked: one ``[]`` int64 per norm; incremented.
        mean: ``[S]``, batch means of a block, float32 or float64.
        var: ``[S]``, biased batch variances.
        offsets: norm ``i`` reads ``mean[offsets[i] : offsets[i] + C_i]``.
        momentum: one per norm, None for the cumulative average.
        count: number of values ``M`` behind each mean, more than 1; or 0, where only ``num_batches_tracked`` moves.
        total_count: ``[1]``, float64: ``M`` instead of ``count``, where only the device knows it.

    Raises:
        ValueError: shapes or list lengths that do not fit; nothing is written then.

    Note:
        Does nothing inside a backward pass: there ``torch.utils.checkpoint`` runs the forward pass again, whose
        statistics have been counted already.
    """
    torch.ops.fastdense.update_running_stats_(
        running_mean,
        running_var,
        num_batches_tracked,
        mean,
        var,
        offsets,
        [-1.0 if m is None else m for m in momentum],
        count,
        total_count,
    )


@register_fake("update_running_stats_")
def _(*arguments: object) -> None:
    return None

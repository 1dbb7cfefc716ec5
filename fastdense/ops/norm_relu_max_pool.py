# SPDX-License-Identifier: Apache-2.0
"""Batch norm, ReLU and max pool of a stem in one operator, which saves its input and one byte per output."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdense.ops.arguments import (
    BatchStatistics,
    NormWeights,
    check_batch_norms,
    check_input,
    empty_in_layout,
    fill_absent,
    records_gradient,
    statistics_dtype,
)
from fastdense.ops.autograd import no_double_backward, register_autograd, save, saved, wanted
from fastdense.ops.fakes import register_fake

# Positions of a window: one byte names the one that won.
MAX_WINDOW = 255


def norm_relu_max_pool(
    input: Tensor,
    norm: NormWeights,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    process_group: str = "",
) -> tuple[Tensor, BatchStatistics]:
    """Runs ``max_pool(relu(batch_norm(input)))`` in one pass over the input, after one for the statistics.

    Args:
        input: ``[N, C, spatial]`` with one to three spatial dimensions; float64, float32, bfloat16 or float16; any
            strides.
        norm: parameters of the norm; statistics of the batch, or given ones.
        kernel_size: one number a spatial dimension, at most 255 positions together.
        stride: likewise, at least 1.
        padding: likewise, at most half of the kernel; padded values are never the maximum.
        process_group: name of the torch.distributed group that shares batch statistics, as
            :class:`torch.nn.SyncBatchNorm` does; "" for this process alone. All of its processes call the op together.

    Returns:
        ``[N, C, pooled]`` of the input's dtype, with the channels innermost in memory where those of ``input`` are,
        else contiguous; under autocast on a CPU float32 from three spatial dimensions of a 16-bit type, as by
        :func:`torch.nn.functional.max_pool3d`. And the batch statistics ``[C]``, zeros where statistics are given.

    Raises:
        ValueError: shapes or devices that do not fit, a pool as above, one value per channel in training.
        TypeError: a dtype that is not floating point.

    Note:
        Running statistics are not updated: see :func:`update_running_stats_`. Saved for backward: the input, the
        statistics, and one byte per output with the index of the maximum in its window. That element gets the gradient;
        where the maximum is 0, none does. As in torch, the first of equal values is taken, and NaN counts as the
        maximum. Values are compared before they are rounded to a 16-bit type. Sums are float32 for 16-bit types. Reruns
        on one machine with one thread count are bit-identical. Double backward raises.

    Example:
        >>> norm = NormWeights(None, None, torch.zeros(1), torch.ones(1), 0.0)
        >>> y, _ = norm_relu_max_pool(torch.tensor([[[-1.0, -2.0, 3.0, 1.0]]]), norm, [2], [2], [0])
        >>> y
        tensor([[[0., 3.]]])
    """
    check_input("norm_relu_max_pool", input)
    check_batch_norms("norm_relu_max_pool", [norm.groups])
    weights = fill_absent(norm[:4], input)
    out, _, mean, var = torch.ops.fastdense.norm_relu_max_pool(
        input,
        weights,
        norm.eps,
        kernel_size,
        stride,
        padding,
        records_gradient(input, weights),
        process_group,
    )
    if input.dim() == 5 and out.element_size() == 2 and input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        out = out.float()
    return out, BatchStatistics(mean, var)


@register_fake("norm_relu_max_pool")
def _(
    input: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    keep_winners: bool,
    process_group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels, *spatial = input.shape
    pooled = [(size + 2 * p - k) // s + 1 for size, k, s, p in zip(spatial, kernel_size, stride, padding, strict=True)]
    out = empty_in_layout(input, [batch, channels, *pooled])
    winners = torch.empty_like(out, dtype=torch.uint8) if keep_winners else input.new_empty([0], dtype=torch.uint8)
    mean = input.new_empty([channels], dtype=statistics_dtype(input))
    return out, winners, mean, torch.empty_like(mean)


@register_fake("_norm_relu_max_pool_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    winners: Tensor,
    mean: Tensor,
    var: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    needs_grad: Sequence[bool],
    process_group: str,
) -> list[Tensor]:
    grads = [empty_in_layout(input, input.shape) if needs_grad[0] else input.new_empty([0])]
    for weight, needed in zip(norm, needs_grad[1:], strict=True):
        grads.append(torch.empty_like(weight) if needed else input.new_empty([0]))
    return grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, norm, eps, kernel_size, stride, padding, _, process_group = inputs
    _, winners, mean, var = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(winners, mean, var)
    save(ctx, input, winners, mean, var, *norm)
    ctx.arguments = eps, kernel_size, stride, padding
    ctx.process_group = process_group


def _backward(ctx: Any, needs: Sequence[bool], grad_output: Tensor | None, *_: Tensor | None) -> list[Tensor | None]:
    if grad_output is None:
        return [None] * len(needs)
    input, winners, mean, var, *norm = saved(ctx)
    grads = torch.ops.fastdense._norm_relu_max_pool_backward(
        grad_output, input, winners, mean, var, norm, *ctx.arguments, needs, ctx.process_group
    )
    return wanted(grads, needs)


register_autograd("norm_relu_max_pool", _backward, setup_context=_setup_context)
register_autograd("_norm_relu_max_pool_backward", no_double_backward("norm_relu_max_pool"))

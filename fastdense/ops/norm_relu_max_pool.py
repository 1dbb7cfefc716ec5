# SPDX-License-Identifier: Apache-2.0
"""Batch norm, ReLU and max pool of a stem in one operator that keeps its input and a byte a pooled value."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdense.ops.arguments import (
    BatchStatistics,
    NormWeights,
    check_input,
    empty_in_layout,
    fill_absent,
    records_gradient,
    refuse_double_backward,
    statistics_dtype,
)

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
    """Runs ``max_pool(relu(batch_norm(input)))`` in one pass over the input behind its statistics.

    Args:
        input: ``[N, C, spatial]`` with one to three spatial dimensions; float64, float32, bfloat16 or float16; any
            strides.
        norm: parameters of the norm; statistics of the batch, or given ones.
        kernel_size: one number a spatial dimension, at most 255 positions together.
        stride: likewise, at least 1.
        padding: likewise, at most half of the kernel; what it adds never wins.
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
        Running statistics are not touched: see :func:`update_running_stats_`. Kept for backward: the input, the
        statistics, and a byte for each pooled value, the position in the window that won it; it gets the gradient, or
        nobody where the maximum is 0. Of equal values the first wins, and a NaN wins always, as in torch; values are
        compared before they are rounded to a 16-bit type. Sums are float32 for 16-bit types. Deterministic: reruns on
        one machine with one thread count are bit-identical. Double backward raises.

    Example:
        >>> norm = NormWeights(None, None, torch.zeros(1), torch.ones(1), 0.0)
        >>> y, _ = norm_relu_max_pool(torch.tensor([[[-1.0, -2.0, 3.0, 1.0]]]), norm, [2], [2], [0])
        >>> y
        tensor([[[0., 3.]]])
    """
    check_input("norm_relu_max_pool", input)
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


@torch.library.register_fake("fastdense::norm_relu_max_pool")
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


@torch.library.register_fake("fastdense::_norm_relu_max_pool_backward")
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
    ctx.save_for_backward(input, winners, mean, var, *norm)
    ctx.arguments = eps, kernel_size, stride, padding
    ctx.process_group = process_group


def _backward(ctx: Any, grad_output: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    needs_input, needs_norm, *rest = ctx.needs_input_grad
    none = (None,) * len(rest)
    if grad_output is None:
        return (None, [None] * len(needs_norm), *none)
    input, winners, mean, var, *norm = ctx.saved_tensors
    needs_grad = [needs_input, *needs_norm]
    grads = torch.ops.fastdense._norm_relu_max_pool_backward(
        grad_output, input, winners, mean, var, norm, *ctx.arguments, needs_grad, ctx.process_group
    )
    wanted = [g if needed else None for g, needed in zip(grads, needs_grad, strict=True)]
    return (wanted[0], wanted[1:], *none)


def _no_double_backward(ctx: Any, *grads: Any) -> None:
    refuse_double_backward("norm_relu_max_pool")


torch.library.register_autograd("fastdense::norm_relu_max_pool", _backward, setup_context=_setup_context)
torch.library.register_autograd("fastdense::_norm_relu_max_pool_backward", _no_double_backward)

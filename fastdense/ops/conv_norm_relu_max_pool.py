# SPDX-License-Identifier: Apache-2.0
"""A stem that saves its input alone: convolution, batch norm, ReLU and max pool, the first made again in backward.

The convolution is torch's, whose result is the widest tensor of many networks; the rest is
:func:`fastdense.ops.norm_relu_max_pool`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdense.ops.arguments import BatchStatistics, NormWeights, count_pixels, fill_absent
from fastdense.ops.autograd import run_again, save, saved, wanted


class Convolution(NamedTuple):
    """Arguments of ``torch.nn.functional.conv1d`` to ``conv3d``, one number a spatial dimension."""

    weight: Tensor
    bias: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


class Pooled(NamedTuple):
    """The result, the batch statistics of the norm, and how many values are behind each mean."""

    output: Tensor
    statistics: BatchStatistics
    values: int


def conv_norm_relu_max_pool(
    input: Tensor,
    conv: Convolution,
    norm: NormWeights,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    process_group: str = "",
) -> Pooled:
    """Runs ``norm_relu_max_pool(convolution(input))``; backward runs the convolution again.

    Args:
        input: ``[N, C_in, spatial]`` of the weight's dtype; under autocast both are cast to the autocast type.
        conv: the convolution; its ``C`` channels are the norm's.
        norm: as for :func:`fastdense.ops.norm_relu_max_pool`, and so are the sizes of the pool and ``process_group``.

    Note:
        Saved for backward: the input, the statistics, and one byte per output. The gradients are those of the two
        operators one after the other, to the last bit. Double backward raises.
    """
    weight, bias = conv.weight, conv.bias
    if not input.is_meta and torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    convolve = (list(conv.stride), list(conv.padding), list(conv.dilation), False, [0] * len(conv.stride), conv.groups)
    pool = (norm.eps, list(kernel_size), list(stride), list(padding))
    absent = fill_absent(norm[:4], input)
    output, mean, var, count = _Stem.apply(convolve, pool, process_group, input, weight, bias, *absent)
    if (
        input.dim() == 5
        and output.element_size() == 2
        and input.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
    ):
        output = output.float()  # as max_pool3d under autocast
    return Pooled(output, BatchStatistics(mean, var), count)


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        convolve: tuple[Any, ...],
        pool: tuple[Any, ...],
        process_group: str,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *norm: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        features = torch.ops.aten.convolution(input, weight, bias, *convolve)
        output, winners, mean, var = torch.ops.fastdense.norm_relu_max_pool(
            features, list(norm), *pool, True, process_group
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, var)
        save(ctx, input, weight, bias, winners, mean, var, *norm)
        ctx.arguments = convolve, pool, process_group
        return output, mean, var, count_pixels(features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3:]
        if grad is None:
            return (None,) * (3 + len(needs))
        input, weight, bias, winners, mean, var, *norm = saved(ctx)
        convolve, pool, process_group = ctx.arguments
        features = run_again(torch.ops.aten.convolution, input, weight, bias, *convolve)
        of_norm = [any(needs[:3]), *needs[3:]]
        grad, *norm_grads = torch.ops.fastdense._norm_relu_max_pool_backward(
            grad, features, winners, mean, var, norm, *pool, of_norm, process_group
        )
        conv_grads: Sequence[Tensor | None] = (None, None, None)
        if any(needs[:3]):
            sizes = None if bias is None else list(bias.shape)
            del features
            conv_grads = torch.ops.aten.convolution_backward(grad, input, weight, sizes, *convolve, list(needs[:3]))
        return (None, None, None, *conv_grads, *wanted(norm_grads, needs[3:]))

# SPDX-License-Identifier: Apache-2.0
"""The join of a fractal: the mean of several tensors in one pass."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fastdense.ops.arguments import empty_like_layout, is_exporting
from fastdense.ops.autograd import register_autograd
from fastdense.ops.fakes import register_fake


def mean_join(inputs: Sequence[Tensor]) -> Tensor:
    """The mean of tensors, element by element: ``y = (x_1 + ... + x_m) / m``.

    Args:
        inputs: 1 to 16 tensors ``[N, C, ...]`` of one shape and one dtype out of float64, float32, bfloat16 and
            float16; any strides. Under autocast they are cast to the widest of their dtypes.

    Returns:
        ``[N, C, ...]``, with the channels innermost in memory where those of ``inputs[0]`` are, else contiguous.

    Raises:
        TypeError: a dtype that is not floating point, or two dtypes.
        ValueError: no tensor, or more than 16; shapes or devices that do not fit.

    Note:
        Deterministic: added up in the order given and divided once; 16-bit types are added up in float32 and rounded
        once. Linear: derivatives of any order, nothing is saved for backward, and all inputs get the same tensor
        ``dy / m`` as gradient.

    Reference:
        G. Larsson, M. Maire, G. Shakhnarovich. FractalNet: Ultra-Deep Neural Networks without Residuals. ICLR 2017,
        arXiv:1605.07648, section 2.

    Example:
        >>> mean_join([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 8.0]])])
        tensor([[2., 5.]])
    """
    inputs = list(inputs)
    if not inputs:  # no operator can be chosen by the device of nothing
        raise ValueError("mean_join: expected inputs to be 1 to 16 tensors, got 0")
    if len({x.dtype for x in inputs}) > 1 and torch.is_autocast_enabled(inputs[0].device.type):
        widest = reduce(torch.promote_types, (x.dtype for x in inputs))
        inputs = [x.to(widest) for x in inputs]
    if forward_ad._current_level >= 0:
        primals, tangents = zip(*(forward_ad.unpack_dual(x) for x in inputs), strict=True)
        if any(t is not None for t in tangents):  # linear: the derivative of the result is that of the inputs, joined
            moved = [torch.zeros_like(x) if t is None else t for x, t in zip(primals, tangents, strict=True)]
            return forward_ad.make_dual(mean_join(primals), mean_join(moved))
    if is_exporting():  # torch's own operators, which every runtime knows
        return torch.stack(inputs).mean(0)
    return torch.ops.fastdense.mean_join(inputs)


@register_fake("mean_join")
def _(inputs: Sequence[Tensor]) -> Tensor:
    return empty_like_layout(inputs[0], inputs[0].shape[1])


def _backward(ctx: Any, needs: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    share = grad / len(needs)
    return [share if needed else None for needed in needs]


def _vmap(info: Any, in_dims: tuple[Any, ...], inputs: Sequence[Tensor]) -> tuple[Tensor, int]:
    moved = [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(inputs, in_dims[0], strict=True)
    ]
    out = torch.ops.fastdense.mean_join([x.flatten(0, 1) for x in moved])
    return out.unflatten(0, (info.batch_size, -1)), 0


register_autograd("mean_join", _backward)
torch.library.register_vmap("fastdense::mean_join", _vmap)

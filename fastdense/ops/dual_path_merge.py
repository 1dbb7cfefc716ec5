# SPDX-License-Identifier: Apache-2.0
"""The merge of a dual path block in one pass, and its adjoint, the split: for writing your own blocks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdense.ops.arguments import empty_like_layout
from fastdense.ops.autograd import register_autograd, wanted
from fastdense.ops.fakes import register_fake


def dual_path_merge(input: Tensor, features: Tensor, residual_channels: int) -> Tensor:
    """Adds to the residual path and appends to the dense path: ``[x[:R] + z[:R]; x[R:]; z[R:]]``.

    ``x`` is the input, ``z`` are the features, ``[;]`` stands for channels side by side.

    Args:
        input: ``[N, C, ...]``, two to five dimensions, float64, float32, bfloat16 or float16; any strides.
        features: ``[N, R + K, ...]``, dtype and device of ``input``; any strides.
        residual_channels: ``R``, from 0 to ``C`` and to ``R + K``.

    Returns:
        ``[N, C + K, ...]``, with the channels innermost in memory where the input has them so, else contiguous.

    Raises:
        TypeError: a dtype that is not floating point, or two dtypes.
        ValueError: shapes or devices that do not fit, or more residual channels than there are.

    Note:
        Deterministic; sums of 16-bit types are rounded once. Linear: derivatives of any order, nothing is saved for
        backward. A stage of blocks needs no merges: see :func:`dual_path_stage`.

    Reference:
        Y. Chen et al. Dual Path Networks. NIPS 2017, arXiv:1707.01629, equations 5 to 8.

    Example:
        >>> x, z = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0, 30.0]])
        >>> dual_path_merge(x, z, residual_channels=2)
        tensor([[11., 22.,  3., 30.]])
    """
    return torch.ops.fastdense.dual_path_merge(input, features, residual_channels)


def dual_path_split(input: Tensor, channels: int, residual_channels: int) -> tuple[Tensor, Tensor]:
    """Splits channels into two overlapping parts, ``x[:C]`` and ``[x[:R]; x[C:]]``: the adjoint of the merge.

    Args:
        input: ``x``, ``[N, C + K, ...]``, as for :func:`dual_path_merge`.
        channels: ``C``, at least ``R``.
        residual_channels: ``R``.

    Returns:
        ``[N, C, ...]`` and ``[N, R + K, ...]``, which lie in memory like the input.

    Raises:
        TypeError: a dtype that is not floating point.
        ValueError: more channels than there are.

    Example:
        >>> dual_path_split(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), channels=3, residual_channels=2)
        (tensor([[1., 2., 3.]]), tensor([[1., 2., 4.]]))
    """
    return torch.ops.fastdense.dual_path_split(input, channels, residual_channels)


@register_fake("dual_path_merge")
def _(input: Tensor, features: Tensor, residual_channels: int) -> Tensor:
    return empty_like_layout(input, input.shape[1] + features.shape[1] - residual_channels)


@register_fake("dual_path_split")
def _(input: Tensor, channels: int, residual_channels: int) -> tuple[Tensor, Tensor]:
    return (
        empty_like_layout(input, channels),
        empty_like_layout(input, input.shape[1] - channels + residual_channels),
    )


def _setup_merge(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[0].shape[1], inputs[2]


def _merge_backward(ctx: Any, needs: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    return wanted(torch.ops.fastdense.dual_path_split(grad, *ctx.arguments), needs)


def _setup_split(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.residual_channels = inputs[2]


def _split_backward(ctx: Any, needs: Sequence[bool], grad_input: Tensor, grad_features: Tensor) -> list[Tensor]:
    return [torch.ops.fastdense.dual_path_merge(grad_input, grad_features, ctx.residual_channels)]


register_autograd("dual_path_merge", _merge_backward, setup_context=_setup_merge)
register_autograd("dual_path_split", _split_backward, setup_context=_setup_split)

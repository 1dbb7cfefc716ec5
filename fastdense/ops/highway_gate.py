# SPDX-License-Identifier: Apache-2.0
"""The gate of a highway layer in one pass over its input and its one projection."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdense.ops.arguments import empty_like_layout, is_exporting
from fastdense.ops.autograd import no_double_backward, register_autograd, wanted
from fastdense.ops.fakes import register_fake

ACTIVATIONS = ("relu", "tanh", "identity")


def highway_gate(input: Tensor, projection: Tensor, activation: str = "relu") -> Tensor:
    """Mixes an input with its transform: ``y = x + T * (H - x)``, which is ``T * H + (1 - T) * x``.

    ``H = act(first half of the projection)`` and ``T = sigmoid(second half)``, halves of the channels.

    Args:
        input: ``x``, ``[N, C, ...]``, float64, float32, bfloat16 or float16; any strides.
        projection: ``[N, 2 C, ...]``, dtype and device of ``input``; any strides. Under autocast ``input`` is cast
            to the projection's dtype.
        activation: "relu", "tanh" or "identity".

    Returns:
        ``[N, C, ...]``, with the channels innermost in memory where the projection has them so, else contiguous.

    Raises:
        TypeError: a dtype that is not floating point, or two dtypes.
        ValueError: shapes or devices that do not fit, or an unknown ``activation``.

    Note:
        Deterministic; arithmetic in float32 for 16-bit types. Saved for backward: ``input`` and ``projection``; ``H``
        and ``T`` are recomputed. A ``T`` or ``1 - T`` below 1e-37 (1e-307 in float64) counts as 0. Double backward
        raises.

    Reference:
        R. K. Srivastava, K. Greff, J. Schmidhuber. Highway Networks. 2015, arXiv:1505.00387, equation 3.

    Example:
        >>> x, first, second = torch.tensor([[1.0]]), torch.tensor([[3.0]]), torch.tensor([[0.0]])
        >>> highway_gate(x, torch.cat([first, second], 1))
        tensor([[2.]])
    """
    if input.dtype != projection.dtype and torch.is_autocast_enabled(projection.device.type):
        input = input.to(projection.dtype)
    if is_exporting():  # torch's own operators, which every runtime knows
        return _exported(input, projection, activation)
    return torch.ops.fastdense.highway_gate(input, projection, activation)


def _exported(input: Tensor, projection: Tensor, activation: str) -> Tensor:
    h, t = projection.chunk(2, 1)
    if activation != "identity":
        h = h.relu() if activation == "relu" else h.tanh()
    return input + t.sigmoid() * (h - input)


@register_fake("highway_gate")
def _(input: Tensor, projection: Tensor, activation: str) -> Tensor:
    return empty_like_layout(projection, input.shape[1])


@register_fake("_highway_gate_backward")
def _(grad_output: Tensor, input: Tensor, projection: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return empty_like_layout(projection, input.shape[1]), empty_like_layout(projection, projection.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, projection, ctx.activation = inputs
    ctx.save_for_backward(input, projection)


def _backward(ctx: Any, needs: Sequence[bool], grad_output: Tensor) -> list[Tensor | None]:
    return wanted(torch.ops.fastdense._highway_gate_backward(grad_output, *ctx.saved_tensors, ctx.activation), needs)


_refuse = no_double_backward("highway_gate", "write y = x + T * (H - x) with torch operators")
register_autograd("highway_gate", _backward, setup_context=_setup_context)
register_autograd("_highway_gate_backward", _refuse)

# SPDX-License-Identifier: Apache-2.0
"""The dense blocks of super-resolution networks on one shared buffer, as one differentiable operator."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdense._choices import MEMORY_MODES, MemoryMode
from fastdense.ops.arguments import (
    Parameters,
    cast_input,
    check_input,
    check_memory,
    empty_channels_last,
    fake_gradients,
    fill_absent,
)
from fastdense.ops.autograd import no_double_backward, register_autograd, run_again, save, saved, wanted
from fastdense.ops.fakes import register_fake

_OP = "residual_dense_block"


class ConvWeights(NamedTuple):
    """A convolution's ``weight`` ``[out, in, kernel, kernel]`` and ``bias`` ``[out]`` or None."""

    weight: Tensor
    bias: Tensor | None


class FlatResidualBlock(NamedTuple):
    """A block's weights in the order in which the native operator reads them; None for an absent bias."""

    weights: list[Tensor | None]
    first_channels: list[int]
    fusion: bool
    devices: list[torch.device]
    conv_dtypes: list[torch.dtype]


def residual_dense_block(
    input: Tensor,
    layers: Sequence[ConvWeights],
    fusion: ConvWeights | None,
    *,
    negative_slope: float = 0.2,
    scale: float = 1.0,
    outer: Tensor | None = None,
    outer_scale: float = 1.0,
    first_channels: Sequence[int] | None = None,
    memory: MemoryMode = "balanced",
) -> Tensor:
    """Runs a dense block without norms, its local fusion and residual sums on one shared channels-last buffer.

    Layer ``l`` reads the channels ``x_l = [x_0, y_0, ..., y_{l-1}]`` written so far and appends
    ``y_l = lrelu(conv3x3(x_l))``. With the fusion ``f`` of all channels ``r = scale * f + x_0``; the result is ``r``,
    or ``outer_scale * r + outer``. Without a fusion it is the buffer ``[x_0, y_0, ..., y_{L-1}]``.

    Args:
        input: ``[N, C0, H, W]``; float64, float32, bfloat16 or float16; any strides. Under autocast it is cast to the
            autocast type.
        layers: parameters of ``L >= 1`` layers, ``[k, C0 + l * k - first_channels[l], 3, 3]``.
        fusion: ``[C0, C0 + L * k, 1, 1]`` or ``[C0, C0 + L * k, 3, 3]``; None for none, which leaves no residual sums.
        negative_slope: of LeakyReLU, at least 0; 0 makes it ReLU.
        scale: factor of the fusion.
        outer: ``[N, C0, H, W]`` of the input's dtype, or None: the input of a chain of blocks.
        outer_scale: factor of the block where ``outer`` is given.
        first_channels: of each layer, how many of the buffer's first channels it does not read; None for 0.
        memory: "balanced" and "min" are the same; "recompute" saves the input in the buffer's place and runs the layers
            again. The gradients are the same to the last bit.

    Returns:
        ``[N, C0, H, W]``, or ``[N, C0 + L * k, H, W]`` without a fusion, with the channels innermost in memory.

    Raises:
        ValueError: shapes that do not fit, mixed devices, a negative slope, factors that are not finite, unknown
            ``memory``.
        TypeError: a dtype that is not floating point, or weights of another dtype than the input's.

    Note:
        Saved for backward: the buffer, ``C0 + L * k`` numbers per pixel; with "recompute" the input alone, but for
        torch.compile. The gradient of LeakyReLU only needs the sign of its output. Reruns on one machine with one
        thread count are bit-identical. Double backward raises.

    Reference:
        Y. Zhang et al. Residual Dense Network for Image Super-Resolution. CVPR 2018, arXiv:1802.08797, equations 4 to
        7; X. Wang et al. ESRGAN. ECCVW 2018, arXiv:1809.00219, section 3.1.
    """
    return run_flat_residual_block(
        input,
        flatten_residual_block(layers, fusion, first_channels),
        negative_slope=negative_slope,
        scale=scale,
        outer=outer,
        outer_scale=outer_scale,
        memory=memory,
    )


def flatten_residual_block(
    layers: Sequence[ConvWeights], fusion: ConvWeights | None, first_channels: Sequence[int] | None = None
) -> FlatResidualBlock:
    parameters = Parameters()
    for conv in layers if fusion is None else [*layers, fusion]:
        parameters.biased_conv(*conv)
    first = [0] * len(layers) if first_channels is None else list(first_channels)
    return FlatResidualBlock(parameters.weights, first, fusion is not None, parameters.devices, parameters.conv_dtypes)


def run_flat_residual_block(
    input: Tensor,
    flat: FlatResidualBlock,
    *,
    negative_slope: float,
    scale: float = 1.0,
    outer: Tensor | None = None,
    outer_scale: float = 1.0,
    memory: str = "balanced",
    contiguous: bool = False,
) -> Tensor:
    """:func:`residual_dense_block` with its weights in a list."""
    check_memory(_OP, memory, MEMORY_MODES)
    check_input(_OP, input)
    weights = fill_absent(flat.weights, input)
    if outer is not None:
        outer = cast_input(_OP, outer, [], flat.conv_dtypes)
    input = cast_input(_OP, input, flat.devices, flat.conv_dtypes)
    if outer is None:
        outer_scale = 1.0
    out, _ = torch.ops.fastdense.residual_dense_block(
        input,
        weights,
        flat.first_channels,
        flat.fusion,
        negative_slope,
        scale,
        outer,
        outer_scale,
        contiguous,
        memory == "recompute" and not torch.compiler.is_compiling(),
    )
    return out


@register_fake("residual_dense_block")
def _(
    input: Tensor,
    weights: Sequence[Tensor],
    first_channels: Sequence[int],
    fusion: bool,
    negative_slope: float,
    scale: float,
    outer: Tensor | None,
    outer_scale: float,
    contiguous: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = input.shape
    buffer = empty_channels_last(input, [batch, channels + len(first_channels) * weights[0].shape[0], height, width])
    out = empty_channels_last(input, [batch, channels, height, width]) if fusion else buffer
    return out.contiguous() if contiguous else out, buffer if fusion else input.new_empty([0])


@register_fake("_residual_dense_block_backward")
def _(
    grad_output: Tensor,
    buffer: Tensor,
    weights: Sequence[Tensor],
    first_channels: Sequence[int],
    fusion: bool,
    negative_slope: float,
    scale: float,
    outer_scale: float,
    in_channels: int,
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    return fake_gradients(buffer.narrow(1, 0, in_channels), weights, needs_grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weights, first_channels, fusion, negative_slope, scale, _, outer_scale, *others = inputs
    out, buffer = output
    ctx.set_materialize_grads(False)
    ctx.recompute = any(others[1:])  # behind `contiguous`; the dispatcher leaves out what is as by default
    save(ctx, input if ctx.recompute else buffer if fusion else out, *weights)
    ctx.arguments = (first_channels, fusion, negative_slope, scale, outer_scale, input.shape[1])


def _run_again(arguments: tuple[Any, ...], input: Tensor, weights: list[Tensor]) -> Tensor:
    """The buffer, from the block's input."""
    first_channels, _, negative_slope, *_ = arguments
    layers = weights[: 2 * len(first_channels)]
    how = (first_channels, False, negative_slope, 1.0, None, 1.0)
    return run_again(torch.ops.fastdense.residual_dense_block, input, layers, *how)[0]


def _backward(ctx: Any, needs: Sequence[bool], grad_output: Tensor | None, _: Tensor | None) -> list[Tensor | None]:
    *needs_grad, needs_outer = needs
    if grad_output is None:
        return [None] * len(needs)
    grads: list[Tensor | None] = [None] * len(needs_grad)
    if any(needs_grad):
        features, *weights = saved(ctx)
        buffer = _run_again(ctx.arguments, features, weights) if ctx.recompute else features
        made = torch.ops.fastdense._residual_dense_block_backward(
            grad_output, buffer, weights, *ctx.arguments, needs_grad
        )
        grads = wanted(made, needs_grad)
    return [*grads, grad_output if needs_outer else None]


register_autograd(_OP, _backward, setup_context=_setup_context)
register_autograd(f"_{_OP}_backward", no_double_backward(_OP))

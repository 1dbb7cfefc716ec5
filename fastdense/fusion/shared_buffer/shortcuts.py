# SPDX-License-Identifier: Apache-2.0
"""What a second run of a layer leaves out: its results, which the buffer holds.

A layer that ends with convolutions computes them for nobody, and so does one that joins its input and the new features.
Gradients need neither. A watch on the functions that the layer calls gives a result without numbers in their place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS: tuple[Callable[..., Any], ...] = (torch.conv1d, torch.conv2d, torch.conv3d)
_ARGUMENTS = 7  # input, weight, bias, stride, padding, dilation, groups: as modules call it


class End(NamedTuple):
    """How a layer ends.

    Args:
        joins: it returns the concatenation of its input and what it made, and nothing else reads that.
        convolutions: which of its convolutions make its results, counted from 1.
    """

    joins: bool = False
    convolutions: tuple[int, ...] = ()


class Watch(TorchFunctionMode):
    """Sees how a layer ends."""

    def __init__(self, input: Any) -> None:
        super().__init__()
        self.input = input
        self.convolutions: list[Tensor] = []
        self.joined: list[tuple[Tensor, Tensor]] = []  # results, and the new features in them
        self.read: list[Any] = []  # what functions were given

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for arg in (*args, *(kwargs or {}).values()):
            self.read += arg if isinstance(arg, list | tuple) else (arg,)
        if func in _CONVOLUTIONS:
            self.convolutions.append(out)
        if (new := _new_in(func, args, kwargs, self.input)) is not None:
            self.joined.append((out, new))
        return out

    def end(self, *results: Any) -> End:
        """How the layer ends that has returned ``results``."""
        new = next((new for result, new in self.joined if result is results[0]), None)
        joins = new is not None
        if joins and self._reads(results[0]) > 0:
            return End()
        last = [new] if joins else [result for result in results if self._reads(result) == 0]
        if joins and self._reads(new) > 1:
            last = []
        made = (at for at, conv in enumerate(self.convolutions, 1) if any(conv is result for result in last))
        return End(joins, tuple(at for at in made if self.convolutions[at - 1]._version == 0))

    def _reads(self, tensor: Any) -> int:
        return sum(given is tensor for given in self.read)


class Shortcut(TorchFunctionMode):
    """Leaves out the end of a layer whose input is ``input``; ``new`` is what then stands for its results."""

    def __init__(self, end: End, input: Tensor) -> None:
        super().__init__()
        self.end, self.input = end, input
        self.convolutions = 0
        self.new: list[Tensor] = []
        self.joined = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CONVOLUTIONS:
            self.convolutions += 1
            if (
                self.convolutions in self.end.convolutions
                and len(args) == _ARGUMENTS
                and not kwargs
                and type(args[4]) is tuple
            ):
                self.new.append(_Uncomputed.apply(*args))
                return self.new[-1]
        if self.end.joins and (new := _new_in(func, args, kwargs, self.input)) is not None:
            self.joined = True
            self.new.append(new)
            return new
        return func(*args, **(kwargs or {}))


def _new_in(func: Any, args: Any, kwargs: Any, input: Any) -> Tensor | None:
    """What is joined with the input of a layer, in a call that joins these two and no more."""
    if func is not torch.cat or len(args) == 0 or len(args[0]) != 2:
        return None
    dim = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
    others = [tensor for tensor in args[0] if tensor is not input]
    return others[0] if dim == 1 and len(others) == 1 else None


class _Uncomputed(torch.autograd.Function):
    """A convolution whose result nobody reads: memory of its shape, and the gradients of a convolution."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.options = (stride, padding, dilation, False, [0] * len(stride), groups)
        sizes = (
            (size + 2 * p - d * (kernel - 1) - 1) // s + 1
            for size, kernel, s, p, d in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        )
        return input.new_empty(input.shape[0], weight.shape[0], *sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.convolution_backward(grad, input, weight, ctx.bias_sizes, *ctx.options, needs)
        return (*(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None, None, None)

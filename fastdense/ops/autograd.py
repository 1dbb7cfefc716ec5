# SPDX-License-Identifier: Apache-2.0
"""Gradients of native operators, which several threads may ask of one graph, whatever hooks make of saved tensors."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastdense.ops.flops import uncounted

_IN_PLACE = "modified by an inplace operation"
_LIBRARY = torch.library.Library("fastdense", "FRAGMENT")


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def register_autograd(
    name: str,
    backward: Callable[..., Sequence[Tensor | None]],
    *,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] = _keep_nothing,
) -> None:
    """Registers the gradient of a native operator.

    In place of ``torch.library.register_autograd``: that one writes ``ctx.needs_input_grad`` for the time of a backward
    pass, where two threads that go through one graph find each other's. Here a backward pass writes nothing.

    Args:
        name: of the operator.
        backward: called with ctx; one bool for each tensor among the arguments, those of a list in its place, that says
            whether its gradient is wanted; and the gradients of the results. Returns a gradient for each of these
            tensors, or None.
        setup_context: called with ctx, arguments and results; keeps what backward needs.
    """
    op = getattr(torch.ops.fastdense, name).default
    tensors = [at for at, argument in enumerate(op._schema.arguments) if "Tensor" in str(argument.type)]
    returns_list = str(op._schema.returns[0].type) == "List[Tensor]"

    def forward(ctx: Any, keyset: Any, arguments: tuple[Any, ...], *_: Tensor | None) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
            setup_context(ctx, arguments, output)
        return tuple(output) if returns_list else output

    def run_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *backward(ctx, ctx.needs_input_grad[2:], *grads))

    functions = {"forward": staticmethod(forward), "backward": staticmethod(run_backward)}
    gradient: Any = type(f"fastdense_{name}", (torch.autograd.Function,), functions)

    def call(keyset: Any, *arguments: Any) -> Any:
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
        flat: list[Tensor | None] = []
        for at in tensors:
            flat.extend(arguments[at]) if isinstance(arguments[at], list) else flat.append(arguments[at])
        output = gradient.apply(keyset, arguments, *flat)
        return list(output) if returns_list else output

    _LIBRARY.impl(name, call, "Autograd", with_keyset=True)


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Keeps tensors for the backward pass; those without elements beside the others.

    Hooks on saved tensors see what plain modules save, which leaves nothing out and keeps no empty tensors: a hook that
    looks for the largest number, for instance, could not pack them.
    """
    ctx.empty = {at: t.detach() for at, t in enumerate(tensors) if t is not None and _is_empty(t)}
    ctx.save_for_backward(*(None if at in ctx.empty else t for at, t in enumerate(tensors)))


def _is_empty(t: Tensor) -> bool:
    return any(isinstance(size, int) and size == 0 for size in t.shape)


def saved(ctx: Any) -> list[Any]:
    """The tensors that :func:`save` kept, in their order."""
    try:
        tensors = ctx.saved_tensors
    except RuntimeError as error:
        if _IN_PLACE not in str(error):
            raise
        raise RuntimeError(
            "fastdense: what a fused module gave, or read, was modified in place before the backward pass read it, for "
            "example by nn.ReLU(inplace=True) after it: use an operation that is not in place, or clone what it works "
            f"on ({error})"
        ) from None
    return [ctx.empty.get(at, t) for at, t in enumerate(tensors)]


def run_again(op: Callable[..., Any], *arguments: Any) -> Any:
    """Calls an operator again for its backward pass, left out of what is counted.

    With a graph where the backward pass has one: gradients of gradients that would go through it have to be refused.
    """
    with uncounted():
        return op(*arguments)


def wanted(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Those of the gradients that somebody asked for."""
    return [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]


def no_double_backward(
    op: str, instead: str = "call fastdense.restore(model) for plain modules"
) -> Callable[..., NoReturn]:
    """The gradient of an operator's backward operator, which has none."""

    def refuse(*_: Any) -> NoReturn:
        raise RuntimeError(f"{op}: double backward is not supported; {instead}")

    return refuse


def refuse_double_backward(
    op: str, gradients: Sequence[Tensor | None], made_of: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients that a backward pass without a graph has made, such that their own raise an error.

    In place of ``once_differentiable``, whose gradients depend on nothing: ``torch.autograd.grad`` leaves them out.

    Args:
        op: as the error calls it.
        made_of: what they were made of; all that they depend on is in its graph.
    """
    if not torch.is_grad_enabled():
        return tuple(gradients)
    return _Refusal.apply(op, len(gradients), *gradients, *made_of)


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.op = op
        return tuple(t if t is None else t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        no_double_backward(ctx.op)()

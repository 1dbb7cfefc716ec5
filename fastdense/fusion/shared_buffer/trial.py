# SPDX-License-Identifier: Apache-2.0
"""Finds out on a copy whether a module is a dense block of any layers: what each reads is all that was made before."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdense.fusion.checks import NotFusible
from fastdense.fusion.equivalence import (
    Situation,
    Step,
    Trial,
    double_copy,
    isolated,
    plain_forward,
    random_input,
)
from fastdense.fusion.inferred_layers import _behind as behind
from fastdense.fusion.inferred_layers import _layer_modules as layer_modules
from fastdense.fusion.inferred_layers import count_heads
from fastdense.fusion.plan.outcome import code_of, tried
from fastdense.fusion.shared_buffer.function import run_layers
from fastdense.fusion.shared_buffer.layers import Block, Form, first_convolution, read_layers
from fastdense.fusion.shared_buffer.reruns import Owners
from fastdense.fusion.shared_buffer.shortcuts import End, Watch


def read_shared_block(module: nn.Module) -> Block:
    """Reads a block of layers that may compute anything; raises NotFusible where it has to run as plain modules."""
    heads = count_heads(module)
    named = list(layer_modules(module, heads))
    form = tried(module, lambda module: _try_out(behind(module, heads)), "shared_outcome")
    return read_layers(named, form, list(module.children())[:heads])


class _Seen(NamedTuple):
    """A call of a layer: its arguments, its result and how it ended."""

    layer: nn.Module
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    out: Any
    end: End


def _try_out(module: nn.Module) -> Form:
    """Compares output, gradients and statistics of the module with those of its layers on one buffer."""
    with isolated():
        twin = double_copy(module)
        named = list(layer_modules(twin, 0))
        if not named:
            raise NotFusible("it has no layers")
        layers = [layer for _, layer in named]
        conv = first_convolution(layers)
        x = random_input(conv, conv.in_channels)
        forward = plain_forward(twin)
        seen, trial, made = observed(twin, forward, x, lambda: _observe(layers, forward, x))
        for prepends in (False, True):
            form = seen._replace(prepends=prepends)
            if trial.agrees(_shared(named, form), made):
                return form
    raise NotFusible("its results differ from those of layers that each read all features before them")


def _shared(named: list[tuple[str, nn.Module]], form: Form) -> Callable[[Tensor], Tensor]:
    return lambda x: run_layers(read_layers(named, form), x, Owners(), redraws=False)


def observed(
    twin: nn.Module, forward: Callable[[Tensor], Any], x: Tensor, observe: Callable[[], Form]
) -> tuple[Form, Trial, dict[Situation, Step]]:
    """How a module calls its layers, as ``observe`` sees, and its steps."""
    trial, before, forms = Trial(twin, x, OwnNumbers, runs_its_code=True), code_of(twin), []
    for mode in (True, False):
        twin.train(mode)
        forms.append(observe())
    made = trial.steps(forward)
    if code_of(twin) != before:
        raise NotFusible("its forward changes its attributes")
    return _common(*forms)._replace(moves_twice=made[Situation(True)].moves_twice), trial, made


def _observe(layers: list[nn.Module], forward: Callable[[Tensor], Any], x: Tensor) -> Form:
    """How layers are called, as the last call shows, and how each ends; not yet where the new features stand."""
    calls: list[_Seen] = []
    try:
        for layer in layers:
            layer.forward = _watched(layer, layer.forward, calls)
        with torch.no_grad(), OwnNumbers():
            out = forward(x)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
    if [call.layer for call in calls] != layers:
        raise NotFusible("its forward does not call each layer once, in order")
    last = calls[-1]
    features = last.arguments[0] if len(last.arguments) == 1 else last.arguments
    takes: Literal["tensor", "list", "tensors"] = "tensor" if isinstance(features, Tensor) else "list"
    if takes == "list" and len(last.arguments) > 1:
        takes = "tensors"
    tensors = [features] if isinstance(features, Tensor) else features
    if last.named or not all(isinstance(t, Tensor) and t.dim() > 1 for t in (*tensors, last.out, out)):
        raise NotFusible("its layers take or return something else than tensors")
    return Form(takes, last.out.shape[1] == out.shape[1], ends=tuple(call.end for call in calls))


def _watched(layer: nn.Module, forward: Callable[..., Any], calls: list[_Seen]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with Watch(arguments[0] if arguments else None) as watch:
            out = forward(*arguments, **named)
        calls.append(_Seen(layer, arguments, named, out, watch.end(out)))
        return out

    return call


def _common(first: Form, second: Form) -> Form:
    """What is seen in training and in eval mode."""
    ends = (a if a == b else End() for a, b in zip(first.ends, second.ends, strict=True))
    if first._replace(ends=()) != second._replace(ends=()):
        raise NotFusible("its layers are called otherwise in eval mode")
    return first._replace(ends=tuple(ends))


class OwnNumbers(TorchDispatchMode):
    """Gives operators that draw random numbers a generator of its own: torch's belongs to the caller.

    It begins anew for each of them. So a second run draws the same numbers, whoever makes it. It sees the operators of
    its own thread alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = kwargs.get("generator")
        if given is not None and given is not torch.default_generator:
            raise NotFusible("its forward draws from a generator of its own")
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        return _with_generator(func)(*args, **kwargs, generator=self.generator.manual_seed(0))


def _with_generator(func: Any) -> Any:
    """The overload of an operator that takes a generator as well."""
    wanted = {**_arguments(func), "generator": "Optional[Generator]"}
    for name in func.overloadpacket.overloads():
        overload = getattr(func.overloadpacket, name)
        if _arguments(overload) == wanted:
            return overload
    raise NotFusible(f"its forward draws random numbers by {func}, which takes no generator")


def _arguments(func: Any) -> dict[str, str]:
    return {argument.name: str(argument.type) for argument in func._schema.arguments}

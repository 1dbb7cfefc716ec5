# SPDX-License-Identifier: Apache-2.0
"""Remembers what a trial of a module has told, for as long as the module's code may do nothing else."""

import types
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastdense.fusion.checks import CONVS, NORMS, SAMPLE_NORMS, NotFusible
from fastdense.fusion.plan.code import Sources
from fastdense.fusion.plan.kept import read_sources
from fastdense.fusion.plan.state import STATE, state_of

Outcome = TypeVar("Outcome")


# Attributes of every module, and the one that conversion itself sets.
_NOT_OF_CODE = frozenset([*nn.Module().__dict__, STATE])


_VALUES = (int, float, str, type(None), type, types.FunctionType, types.BuiltinFunctionType)


class Code(NamedTuple):
    """What decides what the code of a module does: classes; numbers, words, functions and plain tensors by place."""

    classes: list[type]
    attributes: dict[tuple[int, str], Any]

    def still_holds(self, now: "Code") -> bool:
        """Attributes that came later do not matter to code that ran without them; FSDP adds some."""
        return self.classes == now.classes and all(
            place in now.attributes and now.attributes[place] == value for place, value in self.attributes.items()
        )


def code_of(module: nn.Module) -> Code:
    """Norms and convolutions are left out: they are read at each call. So is the class of the module itself."""
    code = Code([], {})
    for at, inner in enumerate(module.modules()):
        if isinstance(inner, CONVS + NORMS + SAMPLE_NORMS):
            continue
        if inner is not module:
            code.classes.append(type(inner))
        for name, value in inner.__dict__.items():
            if name not in _NOT_OF_CODE:
                _note(code.attributes, at, name, value, depth=2)
    return code


def _note(attributes: dict[tuple[int, str], Any], at: int, name: str, value: Any, depth: int) -> None:
    if isinstance(value, Tensor):
        attributes[at, name] = (id(value), None if value.is_inference() else value._version)
    elif isinstance(value, _VALUES):
        attributes[at, name] = value
    elif isinstance(value, list | tuple) and all(isinstance(item, _VALUES) for item in value):
        attributes[at, name] = tuple(value)
    elif depth > 0:  # what a dict or an object holds, as configurations are
        is_dict = isinstance(value, dict)  # of which the compiler does not read the module
        items = value if is_dict else getattr(value, "__dict__", {})
        if is_dict or not (isinstance(value, nn.Module) or type(value).__module__.partition(".")[0] == "torch"):
            for key, item in items.items():
                _note(attributes, at, f"{name}.{key}", item, depth - 1)


def tried(module: nn.Module, attempt: Callable[[nn.Module], Outcome], place: str = "outcome") -> Outcome:
    """What ``attempt`` finds out, or the reason why nothing: remembered until the module's code may do other things.

    It is remembered in an attribute of the module's state.
    """
    if "forward" in module.__dict__:
        raise NotFusible("its forward was replaced on the instance")
    code, state = code_of(module), state_of(module)
    known = getattr(state, place)
    sources = None if torch.compiler.is_compiling() else read_sources((module,), known and known.sources)
    if known is None or not known.still_holds(code, sources):
        if any(p.is_meta for p in module.parameters()):
            raise NotFusible("its weights are on the meta device; convert after loading them")
        found: Any
        try:
            if sources is not None and sources.draws:
                raise NotFusible("its forward draws random numbers")
            found = attempt(module)
            if sources is not None and not sources.still_holds():
                sources = None
                raise NotFusible("its forward changes what its code reads")
        except NotFusible as reason:
            found = str(reason)
        known = _Known(code, sources, found)
        setattr(state, place, known)
    if isinstance(known.found, str):
        raise NotFusible(known.found)
    return known.found


class _Known(NamedTuple):
    """What a trial has told, and of which code."""

    code: Code
    sources: Sources | None  # None where trials change what they read: another would tell nothing new
    found: Any

    def still_holds(self, code: Code, sources: Sources | None) -> bool:
        is_known = sources is None or self.sources is None or sources is self.sources
        return is_known and self.code.still_holds(code)

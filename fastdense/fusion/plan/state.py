# SPDX-License-Identifier: Apache-2.0
"""What a fused module knows about itself, under one attribute, so that no attribute of a user's class is in the way."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastdense.fusion.plan.frozen import Freezer

# The attribute; csrc/python/fingerprint.cpp knows its name.
STATE = "_fastdense"


class State:
    """How a fused module runs, and what it has found out.

    Plans and frozen weights stay behind where a module is copied or pickled: they belong to the parameters of one
    module. The outcome of
    an equivalence check goes with a copy, but not into a file: other code may be behind the same names there. A block
    has a stem until it has run, or has said that the stem in front of it runs as plain modules.
    """

    def __init__(self, memory: str | None = None, name: str = "", reason: str = "", outcome: Any = None) -> None:
        self.memory = memory
        self.name = name
        self.reason = reason
        self.outcome = outcome  # of the check for one operator
        self.shared_outcome: Any = None  # and of that for plain layers on a shared buffer
        self.has_stem = False
        self.kept: Any = None
        self.steps: dict[int, Any] = {}
        self.freezer = Freezer()

    def __copy__(self) -> State:
        copied = State(self.memory, self.name, self.reason, self.outcome)
        copied.shared_outcome, copied.has_stem = self.shared_outcome, self.has_stem
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        return State, (self.memory, self.name, self.reason)


def state_of(module: nn.Module) -> State:
    """The state of a module; modules that were made without one get one."""
    state = module.__dict__.get(STATE)
    if state is None:
        state = module.__dict__.setdefault(STATE, State())
    return state


def memory_of(module: nn.Module) -> Any:
    """The memory mode: that of the conversion, or the attribute of this library's own blocks."""
    state = module.__dict__.get(STATE)
    if state is not None and state.memory is not None:
        return state.memory
    return module.__dict__.get("memory", "balanced")


def plain_class(kind: Any) -> Any:
    """The plain class behind a fused one, ``Plain`` of ``class Fused(Mixin, Plain)``, through subclasses of it.

    A class that is not fused is its own.
    """
    for base in kind.__mro__:
        if len(base.__bases__) == 2 and base.__bases__[0].__module__.startswith("fastdense.fusion."):
            return base.__bases__[1]
    return kind


def is_own(kind: Any) -> bool:
    """Whether a fused class is one of :mod:`fastdense.nn`, whose ``memory`` is an attribute for everybody."""
    return plain_class(kind).__module__.startswith("fastdense.plain.")


def renewed(attributes: dict[str, Any], keeps_memory: bool) -> dict[str, Any]:
    """Attributes of a module that version 0.1.0 pickled: its state was four attributes."""
    old = {"_fused_name", "_fallback_reason", "_trial_outcome"}
    if old.isdisjoint(attributes):
        return attributes
    kept = {name: value for name, value in attributes.items() if name not in old}
    memory = None if keeps_memory else kept.pop("memory", None)
    kept[STATE] = State(memory, attributes.get("_fused_name", ""), attributes.get("_fallback_reason", ""))
    return kept

# SPDX-License-Identifier: Apache-2.0
"""Plans: modules are read once; a fingerprint tells at each call whether what was read is still there.

Reading finds the modules, weights and numbers that an operator wants, or the reason why there is none. Both are kept,
with the fingerprint of all modules that were read and of the code that they run. A plan never changes; another takes
its place at once, so that threads may share a module.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fastdense._C import Fingerprint
from fastdense.fusion.checks import NotFusible, check_methods
from fastdense.fusion.plan.code import Sources, find_sources, replaced_in_torch
from fastdense.fusion.plan.state import plain_class

Made = TypeVar("Made")

# Held by a thread that reads modules or runs them again: a backward pass on a shared buffer puts other tensors in the
# places of their parameters meanwhile.
IN_TURN = threading.RLock()
os.register_at_fork(after_in_child=IN_TURN._at_fork_reinit)  # type: ignore[attr-defined]


class Kept(NamedTuple, Generic[Made]):
    """A plan, or the reason why there is none, and what it was read from."""

    plan: Made | None
    reason: str | None
    sources: Sources
    modules: Fingerprint

    def still_holds(self, modules: tuple[nn.Module, ...]) -> bool:
        return self.modules.holds(modules) and self.sources.still_holds()

    def to_store(self) -> Kept[Made]:
        """Itself, without tensors that belong to a graph or a transform: those must not outlive the call."""
        return self if self.modules.is_kept else self._replace(plan=None)

    def get(self) -> Made:
        if self.reason is not None or self.plan is None:
            raise NotFusible(self.reason)
        return self.plan


def keep(modules: tuple[nn.Module, ...], read: Callable[[], Made], before: Kept[Made] | None = None) -> Kept[Made]:
    """Reads modules; ``before`` is an older plan, whose code need not be found again."""
    # Taken before reading: what another thread changes meanwhile is seen at the next call.
    fingerprint = Fingerprint(modules, [])
    sources = read_sources(modules, None if before is None else before.sources)
    plan = reason = None
    try:
        check_sources(sources)
        for module in modules:
            check_methods(module, "it", besides=("forward",))  # a forward of its own is what is called, and calls this
        plan = read()
    except NotFusible as error:
        reason = str(error)
    return Kept(plan, reason, sources, fingerprint)


def read_sources(modules: Iterable[nn.Module], before: Sources | None = None) -> Sources:
    """The code that modules run, of their plain classes where they are fused."""
    classes = frozenset(plain_class(type(inner)) for module in modules for inner in module.modules())
    if before is not None and before.classes == classes and before.still_holds():
        return before
    return find_sources(classes)


def _leave_to_python(*functions: Any) -> None:
    """Tells the compiler never to look into functions, which none of its own code calls; without importing it."""
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    for function in functions:
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))


_leave_to_python(keep, read_sources, find_sources)


def check_sources(sources: Sources) -> None:
    if sources.replaced is not None:
        raise NotFusible(f"{sources.replaced} has been replaced")


def check_compiled_code() -> None:
    """The check of a module that the compiler reads: of all that torch is replaced in, whoever calls it."""
    replaced = replaced_in_torch()
    if replaced != "":
        raise NotFusible(f"{replaced} has been replaced")


def check_function_modes() -> None:
    """Raises NotFusible where somebody watches the functions that plain modules call."""
    if torch._C._len_torch_function_stack() == 0:
        return
    for mode in _get_current_function_mode_stack():
        if type(mode) is not DeviceContext:
            raise NotFusible(f"a {type(mode).__name__} watches the functions that plain modules call")

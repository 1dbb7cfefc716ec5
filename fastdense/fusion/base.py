# SPDX-License-Identifier: Apache-2.0
"""Mixins that run plain modules as one fused operator.

A fused class is ``class Fused(Mixin, Plain)``: it has the plain class's parameters, keys and attributes, so a plain
module becomes a fused one by a change of its class, and back. Where the operator cannot stand in for the modules, the
mixin calls the plain forward and warns once. A mixin has a ``forward``, a ``train`` that hands on the call, and one
attribute for all that it keeps (:mod:`fastdense.fusion.plan.state`): any other name belongs to the plain class.
"""

import copy
import copyreg
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastdense.fusion.checks import NotFusible
from fastdense.fusion.plan.kept import IN_TURN, check_compiled_code, check_function_modes, keep
from fastdense.fusion.plan.state import STATE, is_own, memory_of, plain_class, renewed, state_of
from fastdense.ops.arguments import devices, is_exporting, missing_kernels

Plan = TypeVar("Plan")
_TRACED = (
    "fastdense: what torch.fx makes of a converted model, as in create_feature_extractor, has plain modules, and "
    "saves as much for backward as they do"
)
_WRAP_NOTHING = (Tensor.__torch_function__, torch._C._disabled_torch_function_impl)


class FusedModule(nn.Module):
    """Base of the mixins: pickling, and the refusal of TorchScript."""

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks every module for."""
        refuse_torchscript()

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        make, arguments, *rest = reduced
        bases: Any = type(self).__bases__
        if make is copyreg.__newobj__ and _MADE.get(bases) is type(self):  # type: ignore[attr-defined]
            make, arguments = _new_fused, bases
        if rest and isinstance(rest[0], dict) and STATE in rest[0]:
            rest[0] = {**rest[0], STATE: copy.copy(rest[0][STATE])}  # which copy.copy would share
        return make, arguments, *rest

    def train(self, *mode: Any, **named: Any) -> Any:
        """That of the plain class, whatever it takes; training thaws what :func:`fastdense.freeze` keeps."""
        result = super().train(*mode, **named)
        if self.training and STATE in self.__dict__:
            self.__dict__[STATE].freezer.kept = None
        return result

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            state = renewed(state, is_own(type(self)))
        super().__setstate__(state)


def run_fused(
    module: nn.Module,
    read: Callable[[Any], Plan],
    run: Callable[..., Tensor],
    input: Any,
    *others: Any,
) -> Any:
    """The forward of a mixin: ``run(plan, memory, contiguous, input, *others)``, by the plan of ``read``.

    Runs the plain modules where there is none, or where a program for elsewhere is recorded.
    """
    if wrapped := find_wrapped(input):
        return torch.overrides.handle_torch_function(run_fused, wrapped, module, read, run, input, *others)
    if is_traced(input):
        if type(input) is fx.Proxy:
            warnings.warn(_TRACED, stacklevel=4)
        return run_plain(module, input, *others)
    try:
        return run(plan_of(module, read), memory_of(module), gives_contiguous(input), input, *others)
    except NotFusible as reason:
        return fall_back(module, reason, input, *others)


def plan_of(module: nn.Module, read: Callable[[Any], Plan]) -> Plan:
    """What ``read(module)`` gives, read anew only where something has changed; raises NotFusible as it does."""
    if torch.compiler.is_compiling():  # the compiler reads what it guards
        check_compiled_code()
        return read(module)
    check_function_modes()
    state, modules = state_of(module), (module,)
    with IN_TURN:
        kept = state.kept
        if kept is None or not kept.still_holds(modules):
            kept = keep(modules, lambda: read(module), kept)
            state.kept = kept.to_store()
    return kept.get()


def run_plain(module: nn.Module, input: Tensor, *others: Any) -> Any:
    """Runs the plain modules."""
    return plain_class(type(module)).forward(module, input, *others)


def fall_back(module: nn.Module, reason: NotFusible, input: Tensor, *others: Any) -> Any:
    """Runs the plain modules, and says why where that is new."""
    state = state_of(module)
    if state.reason != str(reason):
        state.reason = str(reason)
        warnings.warn(f"fastdense: {state.name or type(module).__name__} runs as plain modules: {reason}", stacklevel=5)
    return run_plain(module, input, *others)


_MADE: dict[tuple[Any, Any], Any] = {}


def fused_class(mixin: Any, plain: Any) -> Any:
    """The class that runs ``plain`` by ``mixin``; library classes name theirs, others get one made."""
    for known in plain.__subclasses__():
        if issubclass(known, mixin) and known.__bases__ == (mixin, plain):
            return known
    if (mixin, plain) in _MADE:
        return _MADE[mixin, plain]
    body = {"__module__": plain.__module__, "__doc__": plain.__doc__}
    return _MADE.setdefault((mixin, plain), type(f"Fused{plain.__name__}", (mixin, plain), body))


def _new_fused(mixin: type[FusedModule], plain: type[nn.Module]) -> nn.Module:
    return copyreg.__newobj__(fused_class(mixin, plain))  # type: ignore[attr-defined]


def is_traced(input: Any) -> bool:
    """Whether a program for elsewhere is being recorded, by symbolic tracing or an export: of the plain modules."""
    if torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():
        refuse_torchscript()
    return isinstance(input, fx.Proxy) or is_exporting() or torch.onnx.is_in_onnx_export()


def find_wrapped(input: Any) -> tuple[Any, ...]:
    """The inputs whose class, such as MONAI's MetaTensor, wants to wrap what functions make of them."""
    if type(input) is Tensor or not torch._C._is_torch_function_enabled():
        return ()
    return tuple(t for t in (input if isinstance(input, tuple) else (input,)) if _wraps(type(t)))


def _wraps(kind: Any) -> bool:
    return issubclass(kind, Tensor) and kind.__torch_function__ not in _WRAP_NOTHING


def gives_contiguous(input: Any) -> bool:
    """Whether plain modules would give a contiguous result of this input; of a channels-last one they would not.

    Operators put channels innermost: a contiguous result costs a copy, made before running statistics move.
    """
    first = input[0] if isinstance(input, tuple) and input else input
    if not isinstance(first, Tensor):
        raise NotFusible(f"it is given a {type(first).__name__}, not a tensor")
    return first.dim() < 4 or first.stride(1) != 1 or first.is_contiguous()


def refuse_torchscript() -> NoReturn:
    raise RuntimeError(
        "fastdense: TorchScript does not support converted modules; script or trace fastdense.restore(model), "
        "or use torch.export or torch.compile"
    )


def check_no_transforms() -> None:
    """Raises NotFusible under forward-mode derivatives and the transforms of torch.func."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        raise NotFusible("only plain modules support forward-mode derivatives and function transforms")


def _is_wrapper(input: object) -> bool:
    """Whether a tensor holds others, as a DTensor does, and so nothing that an operator could read."""
    return type(input) is not Tensor and is_traceable_wrapper_subclass(input)


def check_runs_here(op: str, input: Tensor) -> None:
    """Raises NotFusible where only plain modules can go in place of an operator."""
    check_no_transforms()
    if _is_wrapper(input):
        raise NotFusible(f"a {type(input).__name__} goes through plain modules only")
    if input.device.type not in devices(op):
        raise NotFusible(missing_kernels(input.device.type))

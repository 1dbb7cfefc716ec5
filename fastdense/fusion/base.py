# SPDX-License-Identifier: Apache-2.0
# SPDX-License-Identifier: Apache-2.0
"""Mixins that run plain modules as one fused operator.

A fused class is ``class Fused(Mixin, Plain)``: it has the plain class's parameters, keys and attributes, so a plain
module becomes a fused one by a change of its class, and back. Where the operator cannot stand in for the modules, the
mixin calls the plain forward and warns once.
"""

import copyreg
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, fx, nn

from fastdense._choices import MEMORY_MODES
from fastdense.fusion.checks import NotFusible
from fastdense.ops.arguments import devices, is_exporting, missing_kernels


class FusedModule(nn.Module):
    """Base of the mixins: memory mode, the plain class behind it, pickling, the one warning."""

    memory: Any = "balanced"  # one of memory_modes
    memory_modes: tuple[str, ...] = MEMORY_MODES

    def fused_run(self, behind: Sequence[nn.Module]) -> "Run | None":
        """The operator call that runs this module and some of those behind it, if there is one."""
        return None

    def plain_forward(self, input: Tensor, *others: Any) -> Tensor:
        """Runs the plain modules."""
        return plain_class(type(self)).forward(self, input, *others)

    def fall_back(self, input: Tensor, reason: NotFusible, *others: Any) -> Tensor:
        if self.__dict__.get("_fallback_reason") != str(reason):
            self.__dict__["_fallback_reason"] = str(reason)
            name = self.__dict__.get("_fused_name") or type(self).__name__
            warnings.warn(f"fastdense: {name} runs as plain modules: {reason}", stacklevel=4)
        return self.plain_forward(input, *others)

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks every module for."""
        refuse_torchscript()

    def __reduce_ex__(self, protocol: Any) -> Any:
        if "_made_by_fuse" not in type(self).__dict__:
            return super().__reduce_ex__(protocol)
        mixin, plain = type(self).__bases__
        return _new_fused, (mixin, plain), self.__dict__


class Run(NamedTuple):
    """Runs the first ``modules`` modules of a sequence as one operator; raises NotFusible where it cannot."""

    modules: int
    call: Callable[[Tensor], Tensor]


_MADE: dict[tuple[Any, Any], Any] = {}


def fused_class(mixin: Any, plain: Any) -> Any:
    """The class that runs ``plain`` by ``mixin``; library classes name theirs, others get one made."""
    for known in plain.__subclasses__():
        if issubclass(known, mixin) and known.__bases__ == (mixin, plain):
            return known
    if (mixin, plain) in _MADE:
        return _MADE[mixin, plain]
    body = {"__module__": plain.__module__, "__doc__": plain.__doc__, "_made_by_fuse": True}
    return _MADE.setdefault((mixin, plain), type(f"Fused{plain.__name__}", (mixin, plain), body))


def plain_class(fused: type[nn.Module]) -> Any:
    """The plain class behind a fused one, through library subclasses of it."""
    for base in fused.__mro__:
        if len(base.__bases__) == 2 and issubclass(base.__bases__[0], FusedModule):
            return base.__bases__[1]
    raise TypeError(f"plain_class: expected a fused class, got {fused.__name__}")


def _new_fused(mixin: type[FusedModule], plain: type[nn.Module]) -> nn.Module:
    return copyreg.__newobj__(fused_class(mixin, plain))  # type: ignore[attr-defined]


def is_traced(input: Any) -> bool:
    """Whether a program for elsewhere is being recorded, by symbolic tracing or an export: of the plain modules."""
    if torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():
        refuse_torchscript()
    return isinstance(input, fx.Proxy) or is_exporting() or torch.onnx.is_in_onnx_export()


def refuse_torchscript() -> NoReturn:
    raise RuntimeError(
        "fastdense: TorchScript does not support converted modules; script or trace fastdense.restore(model), "
        "or use torch.export or torch.compile"
    )


def check_runs_here(op: str, input: Tensor) -> None:
    """Raises NotFusible where only plain modules can go in place of an operator."""
    if forward_ad._current_level >= 0:
        raise NotFusible("forward-mode derivatives go through plain modules only")
    if input.device.type not in devices(op):
        raise NotFusible(missing_kernels(input.device.type))

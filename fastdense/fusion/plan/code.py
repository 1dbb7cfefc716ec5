# SPDX-License-Identifier: Apache-2.0
"""Finds the code that makes the numbers of modules, and what of it is no longer the library's own.

From the ``forward`` of every class the walk follows the names that code uses: methods, functions, modules and data of
the namespaces it was written in. An operator that stands in for modules must not be used where somebody has put
another function in a place that their code reads.
"""

import functools
import random
import sys
import types
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from fastdense._C import Fingerprint

# Packages whose classes are known. What a user's own class does, a trial finds out.
_LIBRARIES = frozenset(
    ["torch", "torchvision", "timm", "monai", "segmentation_models_pytorch", "pretrainedmodels", "fastdense"]
)


# Where a call of a module begins.
_BEGINNINGS = ("forward", "__call__", "__getattr__", "__getattribute__")


# All methods of nn.Module that a call goes through; others may have names that code uses for something else.
_OF_MODULE = frozenset([*_BEGINNINGS, "_call_impl", "_wrapped_call_impl", "_slow_forward"])


_CLASSES_OF_CALLABLES = frozenset(["builtins", "types", "typing", "enum", "collections", "torch"])


class Sources(NamedTuple):
    """The places that the code of some classes reads, and which of them holds something foreign."""

    classes: frozenset[type]
    places: Fingerprint
    replaced: str | None
    draws: bool

    def still_holds(self) -> bool:
        return self.places.holds(())


def find_sources(classes: frozenset[type]) -> Sources:
    walk = _Walk(classes)
    for kind in classes:
        for name in _BEGINNINGS:
            walk.attribute(kind, name)
    return Sources(classes, Fingerprint((), list(walk.places.values())), walk.replaced, walk.draws)


class _Walk:
    def __init__(self, classes: Iterable[type]) -> None:
        self.places: dict[tuple[int, str], tuple[Any, str]] = {}
        self.originals: dict[tuple[int, str], _Original] = {}
        self.replaced: str | None = None
        self.draws = False
        self._methods = {kind: _methods_of(kind) for kind in classes}
        self._functions: dict[int, types.FunctionType] = {}

    def attribute(self, kind: type, name: str) -> None:
        """What ``name`` is on a class."""
        if not self._is_new(kind, name):
            return
        base = next((base for base in kind.__mro__ if name in base.__dict__), object)
        value = base.__dict__.get(name)
        if base is not object:
            self._see(base, name, value, f"{base.__module__}.{base.__qualname__}", _is_at_home(base, name, value))
        self._follow(value)
        function = _function_of(value)
        if function is not None and base is not nn.Module and kind is not torch.Tensor:
            for inner in _names(function.__code__):  # a property on the class would come before the instance
                self.attribute(kind, inner)

    def _see(self, owner: Any, name: str, value: Any, where: str, is_at_home: bool) -> None:
        original = _ORIGINALS.get((id(owner), name))
        if not (is_at_home if original is None else original.still_is(value)):
            self.replaced = self.replaced or f"{where}.{name}"
        elif _package(where) == "torch" and (callable(value) or isinstance(value, types.ModuleType)):
            self.originals[id(owner), name] = _Original(value, _code_of(value))

    def _is_new(self, owner: Any, name: str) -> bool:
        if (id(owner), name) in self.places:
            return False
        self.places[id(owner), name] = (owner, name)
        return True

    def _follow(self, value: Any) -> None:
        function = _function_of(value)
        if function is None or id(function) in self._functions or not _is_followed(function):
            return
        self._functions[id(function)] = function
        names = _names(function.__code__)
        self._globals(function.__globals__, names, set())
        for cell in function.__closure__ or ():
            if self._is_new(cell, ""):
                self._follow(cell.cell_contents)
        for kind, methods in self._methods.items():
            for name in names & methods:
                self.attribute(kind, name)
        if _package(function.__globals__.get("__name__", "")) != "torch":
            for name in names:
                if hasattr(torch.Tensor, name):
                    self.attribute(torch.Tensor, name)

    def _globals(self, namespace: dict[str, Any], names: frozenset[str], seen: set[int]) -> None:
        """What names are in the namespace of a module, and in those of modules that are named."""
        seen.add(id(namespace))
        home = str(namespace.get("__name__", ""))
        for name in names & namespace.keys():
            value = namespace[name]
            if self._is_new(namespace, name):
                self._see(namespace, name, value, home, _is_global_at_home(home, name, value))
                self.draws = self.draws or _draws(value)
                self._follow(value)
            if isinstance(value, types.ModuleType) and id(vars(value)) not in seen and _is_entered(value.__name__):
                self._globals(vars(value), names, seen)
            elif isinstance(value, type) and issubclass(value, torch.autograd.Function):
                self.attribute(value, "forward")


def is_replaced(kind: type, name: str) -> bool:
    """Whether a class of a library has another method than the library gave it."""
    base = next(base for base in kind.__mro__ if name in base.__dict__)
    return not _is_at_home(base, name, base.__dict__[name])


def _methods_of(kind: type) -> frozenset[str]:
    """Names of functions and properties of a class and its bases."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module:
            found |= _OF_MODULE
        elif base is not object:
            found |= {name for name, value in base.__dict__.items() if _function_of(value) is not None}
    return frozenset(found)


def _function_of(value: Any) -> types.FunctionType | None:
    """The function in a method, property, partial or wrapper."""
    for _ in range(10):
        if value is None or isinstance(value, types.FunctionType):
            return value
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, (functools.partial, functools.partialmethod)):
            value = value.func
        else:
            value = getattr(value, "__wrapped__", None) if callable(value) else None
    return None


def _is_followed(function: types.FunctionType) -> bool:
    """Not into what torch.nn is built on, the standard library, numpy, or draws that a fused module makes as well."""
    module = str(function.__globals__.get("__name__", ""))
    if module == "fastdense.plain.stochastic_depth":
        return False
    package = module.partition(".")[0]
    if package == "torch":
        return module.startswith("torch.nn.")
    return package not in sys.stdlib_module_names and package != "numpy"


def _is_entered(module: str) -> bool:
    """Not the standard library, nor torch's private modules but the one in C++."""
    package, _, rest = module.partition(".")
    if package == "torch":
        return not rest.startswith("_") or rest.startswith("_C")
    return package not in sys.stdlib_module_names


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return frozenset(code.co_names).union(*map(_names, inner))


def _package(module: str) -> str:
    return module.partition(".")[0]


def _is_at_home(base: type, name: str, value: Any) -> bool:
    """Whether a class of a library has the attribute that the library gave it."""
    if _package(base.__module__) not in _LIBRARIES:
        return True
    if not callable(value) and _function_of(value) is None:
        return True
    function = _function_of(value)
    for _ in range(10):
        if function is None:
            return _package(type(value).__module__) in _CLASSES_OF_CALLABLES
        home = function.__globals__.get("__name__", "")
        if home == base.__module__ and function.__code__.co_qualname.startswith(f"{base.__qualname__}."):
            return True
        if _package(home) not in _LIBRARIES:
            return False
        function = getattr(function, "__wrapped__", None)
        value = None
    return False


def _is_global_at_home(home: str, name: str, value: Any) -> bool:
    """Whether a name in a module of a library is what the library made it."""
    if _package(home) not in _LIBRARIES:
        return True
    if isinstance(value, types.FunctionType):
        made_in = str(value.__globals__.get("__name__", ""))
        if made_in == home:
            return value.__code__.co_qualname in (name, f"_{name}")  # F.threshold is _threshold
        return _package(made_in) in _LIBRARIES or _package(made_in) in sys.stdlib_module_names
    if isinstance(value, types.ModuleType):
        return sys.modules.get(value.__name__) is value
    if isinstance(value, types.BuiltinFunctionType):
        known = getattr(torch._C._VariableFunctions, name, None) or getattr(torch._C._nn, name, None)
        return _package(home) != "torch" or known is None or known == value
    if isinstance(value, type) or not callable(value):
        return True
    return _package(type(value).__module__) in _CLASSES_OF_CALLABLES


def _draws(value: Any) -> bool:
    """Whether a value is a generator of random numbers that torch does not know."""
    owner = getattr(value, "__self__", None)
    if isinstance(value, types.ModuleType):
        return value.__name__ in ("random", "numpy.random", "secrets")
    kinds = (type(value), type(owner))
    return isinstance(owner, random.Random) or any(kind.__module__.startswith("numpy.random") for kind in kinds)


def _code_of(value: Any) -> types.CodeType | None:
    function = _function_of(value)
    return None if function is None else function.__code__


class _Original(NamedTuple):
    """A function of torch, and its code, as they were when this library was imported."""

    value: Any
    code: types.CodeType | None

    def still_is(self, value: Any) -> bool:
        return value is self.value and _code_of(value) is self.code


_ORIGINALS: dict[tuple[int, str], _Original] = {}


# The same with names that classes inherit, and where each was found.
_LOOKED_UP: list[tuple[Any, str, _Original]] = []


def _read_originals() -> None:
    per_axis = ("Conv", "BatchNorm", "InstanceNorm", "AvgPool", "MaxPool", "Dropout")
    kinds = [getattr(nn, f"{name}{dims}d") for name in per_axis for dims in (1, 2, 3)]
    kinds += [getattr(nn, name) for name in nn.modules.activation.__all__]
    kinds += [nn.SyncBatchNorm, nn.GroupNorm, nn.Dropout, nn.Identity, nn.Sequential, nn.ModuleList]
    walk = _Walk(kinds)
    for kind in kinds:
        for name in _BEGINNINGS:
            walk.attribute(kind, name)
    _ORIGINALS.update(walk.originals)
    for owner, name in walk.places.values():
        value = _look_up(owner, name)
        if callable(value) or isinstance(value, types.ModuleType):
            _LOOKED_UP.append((owner, name, _Original(value, _code_of(value))))


def _look_up(owner: Any, name: str) -> Any:
    """What a name is in a namespace, or on a class through its bases."""
    if isinstance(owner, dict):
        return owner.get(name)
    spaces = (vars(base) for base in getattr(owner, "__mro__", ()))
    return next((space[name] for space in spaces if name in space), None)


_read_originals()


def replaced_in_torch() -> str:
    """What of torch, all modules together, is not what it was; "" for nothing. The compiler takes it for a constant."""
    for owner, name, original in _LOOKED_UP:
        if not original.still_is(_look_up(owner, name)):
            home = owner["__name__"] if isinstance(owner, dict) else f"{owner.__module__}.{owner.__qualname__}"
            return f"{home}.{name}"
    return ""


# What torch.compiler.assume_constant_result sets, without its import of the compiler.
replaced_in_torch._dynamo_marked_constant = True  # type: ignore[attr-defined]

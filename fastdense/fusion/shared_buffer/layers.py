# SPDX-License-Identifier: Apache-2.0
"""The layers of a dense block as plain modules: how they are called, and what a call of one needs besides its input."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastdense._choices import SHARED_BUFFER_MODES
from fastdense.fusion.base import FusedModule
from fastdense.fusion.checks import CONVS, NORMS, NotFusible, check_no_global_hooks, check_no_hooks, forward_of
from fastdense.fusion.shared_buffer.shortcuts import End


class Form(NamedTuple):
    """How a block calls its layers.

    Args:
        takes: one tensor, a list of all features, or each of them as an argument.
        joins: a layer returns what it read together with the new features, else the new features alone.
        prepends: the new features stand in front of earlier ones.
        ends: how each layer ends.
        moves_twice: the plain module moves its running statistics once more in the backward pass.
    """

    takes: Literal["tensor", "list", "tensors"] = "tensor"
    joins: bool = False
    prepends: bool = False
    ends: tuple[End, ...] = ()
    moves_twice: bool = False

    def arguments(self, features: list[Tensor]) -> tuple[Any, ...]:
        """What a layer is called with, of features in the order of their channels."""
        if self.takes == "list":
            return (list(features),)
        return tuple(features) if self.takes == "tensors" else (self.joined(features),)

    def with_new(self, features: list[Tensor], out: Tensor) -> list[Tensor]:
        """The features after a layer, given what it has returned."""
        if self.joins:
            return [out]
        return [out, *features] if self.prepends else [*features, out]

    def joined(self, features: list[Tensor]) -> Tensor:
        return features[0] if self.joins else torch.cat(features, 1)


class Place(NamedTuple):
    """A parameter or buffer: the dict of its module, its name there, and itself."""

    owner: dict[str, Any]
    name: str
    tensor: Tensor


class Layer(NamedTuple):
    """A layer and what is inside: all modules, parameters and buffers, each once for every place where it stands."""

    module: nn.Module
    inner: list[nn.Module]
    parameters: list[Place]
    buffers: list[Place]
    end: End
    recounted: list[Place]  # buffers whose values do not matter to a second run: those of norms that take their own


class Block(NamedTuple):
    """The layers in order; ``heads`` run in front of the first."""

    heads: list[nn.Module]
    layers: list[Layer]
    form: Form
    parameters: list[Tensor]  # of all layers, each once


def read_layers(named: Iterable[tuple[str, nn.Module]], form: Form, heads: Sequence[nn.Module] = ()) -> Block:
    """Reads layers; raises NotFusible where somebody would notice that they run twice."""
    check_no_global_hooks()
    found = list(named)
    ends = form.ends or (End(),) * len(found)
    layers = [read_layer(module, end, name) for (name, module), end in zip(found, ends, strict=True)]
    return Block(list(heads), layers, form, distinct_parameters(layers))


def distinct_parameters(layers: Iterable[Layer]) -> list[Tensor]:
    places = (place for layer in layers for place in layer.parameters)
    return list({id(place.tensor): place.tensor for place in places}.values())


def read_layer(layer: nn.Module, end: End, name: str = "", *, is_called: bool = True) -> Layer:
    """Reads a layer; raises NotFusible where somebody would notice that what is in it runs twice.

    Args:
        is_called: whether the layer itself runs twice, and not only what is in it.
    """
    inner = list(layer.modules())
    for where, module in layer.named_modules(prefix=name):
        if is_called or module is not layer:
            check_no_hooks(module, where)
            if isinstance(module, FusedModule):  # which draws other random numbers than its plain modules
                raise NotFusible(f"{where or type(module).__name__} is fused itself")
        _check_registered(module, where or type(module).__name__)
    recounted = [id(module) for module in inner if isinstance(module, NORMS) and module.training]
    buffers = [(id(module), place) for module in inner for place in _places(module._buffers)]
    return Layer(
        layer,
        inner,
        [place for module in inner for place in _places(module._parameters)],
        [place for owner, place in buffers if owner not in recounted],
        end,
        [place for owner, place in buffers if owner in recounted],
    )


def _places(owner: dict[str, Any]) -> Iterator[Place]:
    return (Place(owner, name, tensor) for name, tensor in owner.items() if tensor is not None)


def _check_registered(module: nn.Module, where: str) -> None:
    """Raises NotFusible where a module holds others, or tensors with gradients, that only its own code knows."""
    if forward_of(module) is None:
        raise NotFusible(f"{where} is of TorchScript, and cannot be watched for changes")
    registered = ("_parameters", "_buffers", "_modules")
    for name, value in module.__dict__.items():
        if name not in registered and any(_is_hidden(item) for item in _items(value)):
            raise NotFusible(f"{where}.{name} has modules or parameters that are not registered")


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list | tuple) else (value,)


def _is_hidden(value: Any) -> bool:
    return isinstance(value, nn.Module) or (isinstance(value, Tensor) and value.requires_grad)


def about_shared_buffer(reason: str, why_not_shared: str | None, memory: str) -> str:
    """Why no operator runs a block, and whether a shared buffer does: where no reason speaks against it."""
    if why_not_shared is None:
        return f'{reason}; memory="min" runs it on a shared buffer'
    if memory in SHARED_BUFFER_MODES and why_not_shared not in ("", reason):
        return f"{reason}; nor does it run on a shared buffer: {why_not_shared}"
    return reason


def first_convolution(layers: Iterable[nn.Module]) -> Any:
    """The convolution that tells how many channels and dimensions the input has."""
    convs = (inner for layer in layers for inner in layer.modules() if isinstance(inner, CONVS))
    found = next(convs, None)
    if found is None:
        raise NotFusible("it has no convolutions")
    return found

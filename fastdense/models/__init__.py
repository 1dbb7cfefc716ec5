# SPDX-License-Identifier: Apache-2.0
"""Models by name: ``create("densenet121", num_classes=10)``; ``list()`` names them all."""

import builtins
from collections.abc import Callable
from typing import Any

from torch import nn

from fastdense.models.densenet import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_cifar,
)
from fastdense.models.dialects import load_densenet, torchvision_keys
from fastdense.models.fc_densenet import FCDenseNet, fc_densenet56, fc_densenet67, fc_densenet103
from fastdense.models.fractalnet import FractalNet, fractalnet
from fastdense.models.highway import HighwayCifar, HighwayMlp, HighwayMnist, highway_cifar, highway_mlp, highway_mnist
from fastdense.models.resnet import ResNet, preresnet_cifar, resnet_cifar, stochastic_depth_cifar
from fastdense.models.resnet_in_resnet import ResNetInResNet, resnet_in_resnet

__all__ = [
    "DenseNet",
    "FCDenseNet",
    "FractalNet",
    "HighwayCifar",
    "HighwayMlp",
    "HighwayMnist",
    "ResNet",
    "ResNetInResNet",
    "create",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_cifar",
    "fc_densenet56",
    "fc_densenet67",
    "fc_densenet103",
    "fractalnet",
    "has_memory_modes",
    "highway_cifar",
    "highway_mlp",
    "highway_mnist",
    "list",
    "load_densenet",
    "preresnet_cifar",
    "resnet_cifar",
    "resnet_in_resnet",
    "stochastic_depth_cifar",
    "torchvision_keys",
]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    make.__name__: make
    for make in (
        densenet121,
        densenet161,
        densenet169,
        densenet201,
        densenet264,
        densenet_cifar,
        fc_densenet56,
        fc_densenet67,
        fc_densenet103,
        fractalnet,
        highway_cifar,
        highway_mlp,
        highway_mnist,
        preresnet_cifar,
        resnet_cifar,
        resnet_in_resnet,
        stochastic_depth_cifar,
    )
}


def list() -> builtins.list[str]:
    """Names that :func:`create` takes, sorted."""
    return sorted(_MODELS)


def has_memory_modes(name: str) -> bool:
    """Whether the model called ``name`` has dense blocks, and so takes the argument ``memory``."""
    return name.startswith(("densenet", "fc_densenet"))


def create(name: str, **kwargs: Any) -> nn.Module:
    """Makes a model with random weights.

    Args:
        name: one of :func:`list`.
        **kwargs: arguments of the function of that name in this module.

    Raises:
        ValueError: if there is no such model.

    Example:
        >>> model = create("densenet_cifar", depth=40, growth_rate=12, num_classes=10)
    """
    if name not in _MODELS:
        raise ValueError(f"create: expected name to be one of {', '.join(list())}, got {name!r}")
    return _MODELS[name](**kwargs)

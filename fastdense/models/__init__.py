# SPDX-License-Identifier: Apache-2.0
"""Models by name: ``create("densenet121", num_classes=10)``; ``list()`` names them all."""

import builtins
from collections.abc import Callable
from typing import Any

from torch import nn

from fastdense._choices import DUAL_PATH_MEMORY_MODES, MEMORY_MODES
from fastdense.models.densenet import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_cifar,
)
from fastdense.models.dpn import DPN, dpn48b, dpn68, dpn68b, dpn92, dpn98, dpn107, dpn131
from fastdense.models.fc_densenet import FCDenseNet, fc_densenet56, fc_densenet67, fc_densenet103
from fastdense.models.fractalnet import FractalNet, fractalnet
from fastdense.models.highway import HighwayCifar, HighwayMlp, HighwayMnist, highway_cifar, highway_mlp, highway_mnist
from fastdense.models.key_mapping import load_densenet, torchvision_keys
from fastdense.models.resnet import ResNet, preresnet_cifar, resnet_cifar, stochastic_depth_cifar
from fastdense.models.resnet_in_resnet import ResNetInResNet, resnet_in_resnet
from fastdense.models.sr.base import SuperResolutionNet
from fastdense.models.sr.checkpoints import load_super_resolution, save_super_resolution
from fastdense.models.sr.drcn import DRCN, drcn
from fastdense.models.sr.edsr import EDSR, edsr, edsr_baseline
from fastdense.models.sr.rdn import RDN, rdn
from fastdense.models.sr.rrdbnet import RRDBNet, rrdbnet
from fastdense.models.sr.srcnn import SRCNN, srcnn
from fastdense.models.sr.srdensenet import SRDenseNet, srdensenet
from fastdense.models.sr.vdsr import VDSR, vdsr

__all__ = [
    "DPN",
    "DRCN",
    "EDSR",
    "RDN",
    "SRCNN",
    "VDSR",
    "DenseNet",
    "FCDenseNet",
    "FractalNet",
    "HighwayCifar",
    "HighwayMlp",
    "HighwayMnist",
    "RRDBNet",
    "ResNet",
    "ResNetInResNet",
    "SRDenseNet",
    "SuperResolutionNet",
    "create",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_cifar",
    "dpn48b",
    "dpn68",
    "dpn68b",
    "dpn92",
    "dpn98",
    "dpn107",
    "dpn131",
    "drcn",
    "edsr",
    "edsr_baseline",
    "fc_densenet56",
    "fc_densenet67",
    "fc_densenet103",
    "fractalnet",
    "highway_cifar",
    "highway_mlp",
    "highway_mnist",
    "list",
    "load_densenet",
    "load_super_resolution",
    "memory_modes",
    "preresnet_cifar",
    "rdn",
    "resnet_cifar",
    "resnet_in_resnet",
    "rrdbnet",
    "save_super_resolution",
    "srcnn",
    "srdensenet",
    "stochastic_depth_cifar",
    "torchvision_keys",
    "vdsr",
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
        drcn,
        edsr,
        edsr_baseline,
        dpn48b,
        dpn68,
        dpn68b,
        dpn92,
        dpn98,
        dpn107,
        dpn131,
        fc_densenet56,
        fc_densenet67,
        fc_densenet103,
        fractalnet,
        highway_cifar,
        highway_mlp,
        highway_mnist,
        preresnet_cifar,
        rdn,
        resnet_cifar,
        resnet_in_resnet,
        rrdbnet,
        srcnn,
        srdensenet,
        stochastic_depth_cifar,
        vdsr,
    )
}


def list() -> builtins.list[str]:
    """Names that :func:`create` takes, sorted."""
    return sorted(_MODELS)


def memory_modes(name: str) -> tuple[str, ...]:
    """Values of the argument ``memory`` of the model called ``name``; none where it has no such argument."""
    if name.startswith("dpn"):
        return DUAL_PATH_MEMORY_MODES
    return MEMORY_MODES if name.startswith(("densenet", "fc_densenet")) else ()


def is_super_resolution(name: str) -> bool:
    """Whether the model called ``name`` enlarges pictures."""
    return issubclass(_MODELS[name].__annotations__["return"], SuperResolutionNet)


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

# SPDX-License-Identifier: Apache-2.0
"""The models by name."""

import builtins
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fastdense._choices import DUAL_PATH_MEMORY_MODES, MEMORY_MODES
from fastdense.models.densenet import (
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_cifar,
)
from fastdense.models.dpn import dpn48b, dpn68, dpn68b, dpn92, dpn98, dpn107, dpn131
from fastdense.models.fc_densenet import fc_densenet56, fc_densenet67, fc_densenet103
from fastdense.models.fractalnet import fractalnet
from fastdense.models.highway import highway_cifar, highway_mlp, highway_mnist
from fastdense.models.recipe import keep_recipe
from fastdense.models.resnet import preresnet_cifar, resnet_cifar, stochastic_depth_cifar
from fastdense.models.resnet_in_resnet import resnet_in_resnet
from fastdense.models.sr.base import SuperResolutionNet
from fastdense.models.sr.drcn import drcn
from fastdense.models.sr.edsr import edsr, edsr_baseline
from fastdense.models.sr.rdn import rdn
from fastdense.models.sr.rrdbnet import rrdbnet
from fastdense.models.sr.srcnn import srcnn
from fastdense.models.sr.srdensenet import srdensenet
from fastdense.models.sr.vdsr import vdsr
from fastdense.models.weights import WeightsLike, find_weights, load_state, read_weights

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

_WITH_WEIGHTS = (
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    dpn48b,
    dpn68,
    dpn68b,
    dpn92,
    dpn98,
    dpn107,
    dpn131,
)


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


def takes_weights(name: str) -> bool:
    """Whether the function of the model called ``name`` has an argument ``weights``."""
    return _MODELS[name] in _WITH_WEIGHTS


def create(name: str, *, weights: WeightsLike | None = None, **kwargs: Any) -> nn.Module:
    """Makes a model, with random weights or those that are given.

    Args:
        name: one of :func:`list`.
        weights: what the function of that name takes; models without published weights take a file alone, of a
            network of the same sizes. Networks for super-resolution take none: see :func:`load_super_resolution`.
        **kwargs: arguments of the function of that name in this module.

    Raises:
        ValueError: if there is no such model, or the weights cannot be read or are another model's.

    Example:
        >>> model = create("densenet_cifar", depth=40, growth_rate=12, num_classes=10)
    """
    if name not in _MODELS:
        raise ValueError(f"create: expected name to be one of {', '.join(list())}, got {name!r}")
    if weights is None:
        return keep_recipe(_MODELS[name](**kwargs), name, kwargs)
    if takes_weights(name):
        return _MODELS[name](weights=weights, **kwargs)
    if is_super_resolution(name):
        raise ValueError(f"create: expected no weights for {name}; load_super_resolution reads its files")
    source = find_weights(name, weights, None)
    assert source is not None
    model = _MODELS[name](**kwargs)
    source.load(name, model)
    return keep_recipe(model, name, kwargs)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a file of weights into a classifier that exists.

    Reads a ``state_dict`` (.pt, .pth, .safetensors) by the model's own names. For DenseNets it reads those of
    torchvision (old and new), timm, MONAI and torchxrayvision. Checkpoints of ``fastdense train``, Lightning and
    timm's training script are read as well, and the prefixes of DataParallel and torch.compile. Nothing in the file is
    executed.

    A warning says where the last layer stays as it is, because the file has one for other classes, or none. It also
    says where the first convolution was adapted to other input channels, as timm does it: summed for one channel, else
    repeated and scaled.

    Args:
        model: of this module, torchvision or timm; its dtype stays. Left as it was if the file does not fit.
        path: the file.

    Raises:
        ValueError: no such file, no weights in it, or those of another model; the message names the entry.
    """
    for word in load_state("load_weights", model, read_weights("load_weights", Path(path)), path):
        warnings.warn(f"fastdense: load_weights: {word}", stacklevel=2)

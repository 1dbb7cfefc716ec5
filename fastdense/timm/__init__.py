# SPDX-License-Identifier: Apache-2.0
"""Importing this registers ``fastdense_densenet121`` and others with timm: timm's own networks, converted.

``timm.create_model("fastdense_densenet121.ra_in1k", pretrained=True)`` builds timm's DenseNet-121 with its weights and
converts it. Every method, key and option of timm stays. ``memory="min"`` chooses the memory mode, and
``set_grad_checkpointing()`` switches to it. ``python -m fastdense.timm SCRIPT`` runs a script with these names.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from fastdense._choices import DualPathMemoryMode
from fastdense._support import extra
from fastdense.fusion.base import FusedModule
from fastdense.fusion.convert import convert

with extra("train"):
    import timm
    from timm import models as _timm_models
    from timm.models import _factory, densenet, dpn
    from timm.models._features import FeatureListNet as _FeatureListNet

__all__ = ["ARCHITECTURES", "convert_created_models"]

ARCHITECTURES = (
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "dpn48b",
    "dpn68",
    "dpn68b",
    "dpn92",
    "dpn98",
    "dpn107",
    "dpn131",
)
"""Networks of timm that are registered, with ``fastdense_`` in front."""

Model = TypeVar("Model", bound=nn.Module)


class _MemoryModes:
    """Checkpointing of timm becomes a memory mode: blocks recompute less, and running statistics move once."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Memory mode "min", or back to "balanced"."""
        assert isinstance(self, nn.Module)
        convert(self, memory="min" if enable else "balanced")


class DenseNet(_MemoryModes, densenet.DenseNet):
    """timm's DenseNet, converted."""


class DPN(_MemoryModes, dpn.DPN):
    """timm's DPN, converted."""


class FeatureListNet(_MemoryModes, _FeatureListNet):
    """timm's list of feature maps (``features_only=True``) of a converted network."""


_CLASSES = {densenet.DenseNet: DenseNet, dpn.DPN: DPN, _FeatureListNet: FeatureListNet}


def _converted(model: Model, memory: DualPathMemoryMode) -> Model:
    convert(model, memory=memory)
    for module in model.modules():
        module.__class__ = _CLASSES.get(type(module), type(module))
    return model


def _register(architecture: str) -> None:
    make = _timm_models.model_entrypoint(architecture)
    name = f"fastdense_{architecture}"

    def create(pretrained: bool = False, *, memory: DualPathMemoryMode | None = None, **kwargs: Any) -> nn.Module:
        efficient = kwargs.pop("memory_efficient", False)
        return _converted(make(pretrained, **kwargs), memory or ("min" if efficient else "balanced"))

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"timm's {architecture}, converted; ``memory`` is the memory mode, other arguments are timm's."
    default_cfgs.update(
        _timm_models._registry.generate_default_cfgs(
            {name + tagged.removeprefix(architecture): cfg for tagged, cfg in _cfgs(architecture).items()}
        )
    )
    globals()[name] = create
    _timm_models.register_model(create)


def _cfgs(architecture: str) -> dict[str, Any]:
    return timm.models.get_arch_pretrained_cfgs(architecture)


default_cfgs: dict[str, Any] = {}
for _architecture in ARCHITECTURES:
    _register(_architecture)
    __all__.pop()  # timm adds what it registers; create_model makes it


def convert_created_models(memory: DualPathMemoryMode = "balanced") -> Callable[[], None]:
    """Makes ``timm.create_model`` convert every model that it makes; ``python -m fastdense.timm --convert`` does so.

    A model without dense or dual path blocks stays as it is, with a warning. A script that has imported
    ``create_model`` by name before this call keeps timm's.

    Args:
        memory: memory mode of the blocks.

    Returns:
        A function that puts timm's own back.
    """
    make = _factory.create_model

    @functools.wraps(make)
    def create_model(*args: Any, **kwargs: Any) -> nn.Module:
        model = make(*args, **kwargs)
        if any(isinstance(module, FusedModule) for module in model.modules()):
            return model
        try:
            return _converted(model, memory)
        except ValueError as error:
            warnings.warn(f"fastdense: the model of timm stays plain: {error}", stacklevel=2)
            return model

    def put(function: Callable[..., nn.Module]) -> None:
        for module in (timm, _timm_models, _factory):
            module.__dict__["create_model"] = function

    put(create_model)
    return lambda: put(make)

# SPDX-License-Identifier: Apache-2.0
"""Reads which activation a module is, as the dense block operator runs it."""

from collections.abc import Callable
from typing import Any

from torch import nn

from fastdense.fusion.checks import NotFusible, check_no_hooks, class_name
from fastdense.ops import Activation

_Reader = Callable[[Any], Activation]


def _named(name: str) -> _Reader:
    return lambda module: Activation(name)


def _gelu(module: Any) -> Activation:
    if module.approximate not in ("none", "tanh"):
        raise NotFusible(f"{module} has an approximation that is not known")
    return Activation("gelu" if module.approximate == "none" else "gelu_tanh")


def _celu(module: Any) -> Activation:
    if not module.alpha > 0:
        raise NotFusible(f"{module} has an alpha that is not above 0")
    return Activation("celu", float(module.alpha))


def _softplus(module: Any) -> Activation:
    if not module.beta > 0:
        raise NotFusible(f"{module} has a beta that is not above 0")
    return Activation("softplus", float(module.beta), float(module.threshold))


def _prelu(module: Any) -> Activation:
    return Activation("prelu", weight=module.weight)


def _swish(module: Any) -> Activation:
    if module.alpha != 1:
        raise NotFusible(f"Swish has alpha {module.alpha}, expected 1")
    return Activation("silu")


_TORCH: dict[str, _Reader] = {
    "ReLU": _named("relu"),
    "ReLU6": _named("relu6"),
    "LeakyReLU": lambda module: Activation("leaky_relu", float(module.negative_slope)),
    "PReLU": _prelu,
    "ELU": lambda module: Activation("elu", float(module.alpha)),
    "CELU": _celu,
    "SELU": _named("selu"),
    "SiLU": _named("silu"),
    "GELU": _gelu,
    "Hardswish": _named("hardswish"),
    "Mish": _named("mish"),
    "Softplus": _softplus,
    "Tanh": _named("tanh"),
    "Sigmoid": _named("sigmoid"),
}


# By module and name, as no library need be loaded.
_READERS: dict[tuple[str, str], _Reader] = {
    **{("torch.nn.modules.activation", name): reader for name, reader in _TORCH.items()},
    ("torch.nn.modules.linear", "Identity"): _named("identity"),
    ("timm.layers.activations", "GELU"): _named("gelu"),
    ("timm.layers.activations", "GELUTanh"): _named("gelu_tanh"),
    ("timm.layers.activations", "PReLU"): _prelu,
    ("timm.layers.activations", "Tanh"): _named("tanh"),
    ("timm.layers.activations", "Sigmoid"): _named("sigmoid"),
    ("monai.networks.blocks.activation", "Swish"): _swish,
    ("monai.networks.blocks.activation", "MemoryEfficientSwish"): _named("silu"),
    ("monai.networks.blocks.activation", "Mish"): _named("mish"),
}


def _reader(module: object) -> _Reader | None:
    kind = type(module)
    return _READERS.get((kind.__module__, kind.__qualname__))


def is_activation(module: object) -> bool:
    """Whether :func:`read_activation` knows the class."""
    return _reader(module) is not None


def read_activation(module: nn.Module, name: str) -> Activation:
    """Raises NotFusible for other classes than those above, and for settings that the operator does not have."""
    reader = _reader(module)
    if reader is None:
        raise NotFusible(f"{name} is a {class_name(module)}, which is no activation that the operator runs")
    check_no_hooks(module, name)
    return reader(module)

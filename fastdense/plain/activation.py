# SPDX-License-Identifier: Apache-2.0
"""Activations by name."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from fastdense.plain.arguments import name_and_arguments

# A name, or a name and the arguments of its class, as MONAI writes it.
ActivationName = str | tuple[str, Mapping[str, Any]]

_CLASSES: dict[str, Callable[..., nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}
_OTHER_NAMES = {"leakyrelu": "leaky_relu", "swish": "silu"}


def make_activation(op: str, act: ActivationName) -> nn.Module:
    """The module of :mod:`torch.nn` with a name, such as "gelu" or ``("leaky_relu", {"negative_slope": 0.1})``.

    Raises:
        ValueError: unknown names, arguments that the class does not take.
    """
    name, arguments = name_and_arguments(op, "act", act)
    lower = name.lower()
    lower = _OTHER_NAMES.get(lower, lower)
    if lower not in _CLASSES:
        raise ValueError(f"{op}: expected act to be one of {', '.join(_CLASSES)}, got {name!r}")
    try:
        return _CLASSES[lower](**arguments)
    except TypeError as error:
        raise ValueError(f"{op}: expected act to have arguments of {name}, got {dict(arguments)!r} ({error})") from None

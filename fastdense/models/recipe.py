# SPDX-License-Identifier: Apache-2.0
"""How a model of the zoo was made, so that it can be made again."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)
Arguments = ParamSpec("Arguments")

_ATTRIBUTE = "_fastdense_recipe"


class Recipe(NamedTuple):
    """Name of a function of :mod:`fastdense.models`, and its arguments without weights."""

    name: str
    kwargs: dict[str, Any]


def keep_recipe(model: Model, name: str, kwargs: Mapping[str, Any]) -> Model:
    """Notes how ``model`` was made, unless it knows already; returns it."""
    model.__dict__.setdefault(_ATTRIBUTE, (name, dict(kwargs)))
    return model


def keeps_recipe(function: Callable[Arguments, Model]) -> Callable[Arguments, Model]:
    """Lets what a function of :mod:`fastdense.models` makes know its name and the arguments that were given."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def make(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Model:
        model, given = function(*args, **kwargs), dict(signature.bind(*args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        return keep_recipe(model, function.__name__, given)

    return make


def recipe_of(model: nn.Module) -> Recipe | None:
    """How ``model`` was made; None where no function of :mod:`fastdense.models` made it."""
    kept = model.__dict__.get(_ATTRIBUTE)
    return None if kept is None else Recipe(*kept)

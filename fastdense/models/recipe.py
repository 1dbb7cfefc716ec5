# SPDX-License-Identifier: Apache-2.0
"""How a model of the zoo was made, so that it can be made again."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)

_ATTRIBUTE = "_fastdense_recipe"


class Recipe(NamedTuple):
    """Name of a function of :mod:`fastdense.models`, and its arguments without weights."""

    name: str
    kwargs: dict[str, Any]


def keep_recipe(model: Model, name: str, kwargs: Mapping[str, Any]) -> Model:
    """Notes how ``model`` was made, unless it knows already; returns it."""
    model.__dict__.setdefault(_ATTRIBUTE, (name, dict(kwargs)))
    return model


def recipe_of(model: nn.Module) -> Recipe | None:
    """How ``model`` was made; None where no function of :mod:`fastdense.models` made it."""
    kept = model.__dict__.get(_ATTRIBUTE)
    return None if kept is None else Recipe(*kept)

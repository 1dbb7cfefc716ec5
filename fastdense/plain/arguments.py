# SPDX-License-Identifier: Apache-2.0
"""Checks of what modules are made with."""

from collections.abc import Mapping
from typing import Any


def check_positive(op: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{op}: expected {name} to be a positive integer, got {size!r}")


def name_and_arguments(op: str, argument: str, given: Any) -> tuple[str, Mapping[str, Any]]:
    """Of a name, or of a name and the arguments of its class.

    Raises:
        ValueError: something else, such as the class itself.
    """
    if isinstance(given, str):
        return given, {}
    if isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[0], str):
        name, arguments = given
        if isinstance(arguments, Mapping):
            return name, arguments
    raise ValueError(f"{op}: expected {argument} to be a name, or a name and a dict of arguments, got {given!r}")


def check_spatial_dims(op: str, spatial_dims: int) -> None:
    if spatial_dims not in (1, 2, 3):
        raise ValueError(f"{op}: expected spatial_dims to be 1, 2 or 3, got {spatial_dims!r}")

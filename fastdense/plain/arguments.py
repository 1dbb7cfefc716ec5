# SPDX-License-Identifier: Apache-2.0
"""Checks of what modules are made with."""


def check_positive(op: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{op}: expected {name} to be a positive integer, got {size!r}")


def check_spatial_dims(op: str, spatial_dims: int) -> None:
    if spatial_dims not in (1, 2, 3):
        raise ValueError(f"{op}: expected spatial_dims to be 1, 2 or 3, got {spatial_dims!r}")

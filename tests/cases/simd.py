# SPDX-License-Identifier: Apache-2.0
"""The SIMD levels of the native code, and tests at one of them."""

import contextlib
import functools
from collections.abc import Iterator

import pytest

from fastdense import _C

LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


@functools.cache
def available_levels() -> tuple[str, ...]:
    """Those of this machine, whatever FASTDENSE_SIMD says."""
    best, levels = _C.build_info()["simd"], []
    for level in LEVELS:
        with contextlib.suppress(ValueError):
            _C.set_simd_level(level)
            levels.append(level)
    _C.set_simd_level(best)
    return tuple(levels)


@contextlib.contextmanager
def simd_level(level: str) -> Iterator[None]:
    best = _C.build_info()["simd"]
    _C.set_simd_level(level)
    try:
        yield
    finally:
        _C.set_simd_level(best)


def has_level(level: str) -> bool:
    """Whether this machine has a level; where it has not, asking for it must be an error."""
    if level in available_levels():
        return True
    with pytest.raises(ValueError, match=level):
        _C.set_simd_level(level)
    return False

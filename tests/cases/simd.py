# SPDX-License-Identifier: Apache-2.0
"""The SIMD levels of the native code, and tests at one of them."""

import contextlib
from collections.abc import Iterator

from fastdense import _C

LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


def available_levels() -> list[str]:
    return list(LEVELS[: LEVELS.index(_C.build_info()["simd"]) + 1])


@contextlib.contextmanager
def simd_level(level: str) -> Iterator[None]:
    best = _C.build_info()["simd"]
    _C.set_simd_level(level)
    try:
        yield
    finally:
        _C.set_simd_level(best)

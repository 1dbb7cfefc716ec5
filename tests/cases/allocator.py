# SPDX-License-Identifier: Apache-2.0
"""An allocator in the place of torch's for CPU tensors: it counts, fails on request, and hands out NaN."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator

from tests.emulation.build import build_with_torch

PLANTED = "planted: not enough memory"


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build_with_torch(["tests/cases/allocator.cpp"])))
    for name in ("allocations", "bytes_in_use"):
        getattr(library, name).restype = ctypes.c_int64
    return library


class Watch:
    """What happens to memory made while the allocator is in place."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def fail_at(self, number: int) -> None:
        """Counts from 1 anew, and fails the allocation of this number; 0 fails none."""
        self.library.fail_at(ctypes.c_int64(number))

    def allocations(self) -> int:
        """How many were asked for since the last :meth:`fail_at`."""
        return self.library.allocations()

    def bytes_in_use(self) -> int:
        return self.library.bytes_in_use()


@contextlib.contextmanager
def watched_allocator(poison: bool = False) -> Iterator[Watch]:
    """Puts the allocator in place.

    Args:
        poison: fill memory with NaN before it is handed out, and when it comes back.
    """
    library = _library()
    watch = Watch(library)
    watch.fail_at(0)
    library.set_poison(poison)
    library.install()
    try:
        yield watch
    finally:
        library.uninstall()
        library.set_poison(False)
        watch.fail_at(0)

# SPDX-License-Identifier: Apache-2.0
"""Densely connected networks on shared buffers: the same results in less memory and time."""

import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdense._build_info import version

__version__ = version()

__all__ = [
    "InsufficientMemory",
    "MemoryPlan",
    "bicubic_resize",
    "build_info",
    "convert",
    "freeze",
    "largest_batch",
    "models",
    "nn",
    "ops",
    "plan_memory",
    "report",
    "restore",
    "set_memory",
    "thaw",
    "upscale",
]


def _is_command() -> bool:
    """Whether Python was started as ``fastdense ...`` or ``python -m fastdense ...``."""
    if sys.argv[:1] == ["-m"]:  # while Python looks for the module; -Im and the like are options too
        return any(
            option[:1] == "-" and option[-1:] == "m" and name == __name__ for option, name in pairwise(sys.orig_argv)
        )
    return Path(*sys.argv[:1]).name == __name__


if TYPE_CHECKING or not _is_command():
    from fastdense import _extension, models, nn, ops  # noqa: F401  (says what to do if there is no torch or no build)
    from fastdense._extension import build_info
    from fastdense._library import (
        InsufficientMemory,
        MemoryPlan,
        bicubic_resize,
        convert,
        freeze,
        largest_batch,
        plan_memory,
        report,
        restore,
        set_memory,
        thaw,
        upscale,
    )
else:

    def __getattr__(name: str) -> Any:
        """Loads the library once a command uses it: torch takes seconds, help and version do without it."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from fastdense import _library

        return getattr(_library, name)

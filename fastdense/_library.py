# SPDX-License-Identifier: Apache-2.0
"""What ``import fastdense`` loads; apart from ``fastdense/__init__.py``, as the command line shows help without it."""

from fastdense import _extension, _old_paths, models, nn, ops
from fastdense.fusion.convert import convert, restore
from fastdense.fusion.report import report
from fastdense.memory.modes import set_memory
from fastdense.memory.plan import InsufficientMemory, MemoryPlan, largest_batch, plan_memory
from fastdense.ops import bicubic_resize
from fastdense.sr.upscaling import upscale

__all__ = [
    "InsufficientMemory",
    "MemoryPlan",
    "bicubic_resize",
    "build_info",
    "convert",
    "largest_batch",
    "models",
    "nn",
    "ops",
    "plan_memory",
    "report",
    "restore",
    "set_memory",
    "upscale",
]

build_info = _extension.build_info
_old_paths.install()

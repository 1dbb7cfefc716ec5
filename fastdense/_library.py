# SPDX-License-Identifier: Apache-2.0
"""What ``import fastdense`` loads; apart from ``fastdense/__init__.py``, as the command line shows help without it."""

from fastdense import _extension, _old_paths, models, nn, ops
from fastdense.fusion.convert import convert, restore
from fastdense.fusion.report import report
from fastdense.ops import bicubic_resize
from fastdense.sr.upscaling import upscale

__all__ = ["bicubic_resize", "build_info", "convert", "models", "nn", "ops", "report", "restore", "upscale"]

build_info = _extension.build_info
_old_paths.install()

# SPDX-License-Identifier: Apache-2.0
"""What ``import fastdense`` loads; apart from ``fastdense/__init__.py``, as the command line shows help without it."""

import fastdense.models as models
import fastdense.nn as nn
import fastdense.ops as ops
from fastdense import _old_paths
from fastdense._extension import build_info
from fastdense.fusion.convert import convert, restore
from fastdense.fusion.report import report
from fastdense.ops import bicubic_resize
from fastdense.sr.upscaling import upscale

__all__ = ["bicubic_resize", "build_info", "convert", "models", "nn", "ops", "report", "restore", "upscale"]

_old_paths.install()

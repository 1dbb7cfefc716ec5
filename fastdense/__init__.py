# SPDX-License-Identifier: Apache-2.0
"""Densely connected networks on shared buffers: the same numbers, less memory, more speed."""

import torch  # noqa: F401  (loads the libraries that _C links against)

from fastdense import _C, models, nn, ops
from fastdense.convert import convert, restore
from fastdense.model_report import report
from fastdense.ops import bicubic_resize
from fastdense.upscaling import upscale

__version__: str = _C.build_info()["version"]

build_info = _C.build_info

__all__ = ["bicubic_resize", "build_info", "convert", "models", "nn", "ops", "report", "restore", "upscale"]

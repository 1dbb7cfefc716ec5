# SPDX-License-Identifier: Apache-2.0
"""What ``import fastdense`` loads; apart from ``fastdense/__init__.py``, as the command line shows help without it."""

from fastdense import _extension, _old_paths
from fastdense import models as models
from fastdense import nn as nn
from fastdense import ops as ops
from fastdense.fusion.convert import convert as convert
from fastdense.fusion.convert import restore as restore
from fastdense.fusion.report import report as report
from fastdense.inference import freeze as freeze
from fastdense.inference import thaw as thaw
from fastdense.memory.modes import set_memory as set_memory
from fastdense.memory.plan import InsufficientMemory as InsufficientMemory
from fastdense.memory.plan import MemoryPlan as MemoryPlan
from fastdense.memory.plan import largest_batch as largest_batch
from fastdense.memory.plan import plan_memory as plan_memory
from fastdense.ops import bicubic_resize as bicubic_resize
from fastdense.sr.upscaling import upscale as upscale

build_info = _extension.build_info
_old_paths.install()

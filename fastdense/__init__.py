# SPDX-License-Identifier: Apache-2.0
"""Densely connected networks on shared buffers: the same numbers, less memory, more speed."""

from typing import TYPE_CHECKING

import torch  # noqa: F401  (loads the libraries that _C links against)

from fastdense import _C, _old_paths, models, nn, ops
from fastdense.fusion.convert import convert, restore
from fastdense.fusion.report import report
from fastdense.ops import bicubic_resize
from fastdense.sr.upscaling import upscale

if TYPE_CHECKING:
    from fastdense._C import BuildInfo

_old_paths.install()

__version__: str = _C.build_info()["version"]


def build_info() -> "BuildInfo":
    """What was compiled, and what it makes of this machine.

    Returns:
        A dict of ``version``; ``torch``, the version compiled with; ``cuda`` and ``cuda_arch_list``, None in a build
        for the CPU alone; ``compiler``; ``simd``, the vector instructions in use; ``cuda_kernels``, the choice
        of FASTDENSE_CUDA_KERNELS; ``threads`` of this machine.
    """
    return _C.build_info()


__all__ = ["bicubic_resize", "build_info", "convert", "models", "nn", "ops", "report", "restore", "upscale"]

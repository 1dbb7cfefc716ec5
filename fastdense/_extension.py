# SPDX-License-Identifier: Apache-2.0
"""The compiled module, imported once torch has loaded the libraries that it needs, or an error that says what to do."""

from typing import TYPE_CHECKING

from fastdense._build_info import (
    ExtensionError,
    explain,
    explain_missing_build,
    explain_missing_torch,
    find_binary,
)

if find_binary() is None:
    raise ExtensionError(explain_missing_build())

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ExtensionError(explain_missing_torch()) from None

try:
    from fastdense import _C
except ImportError as error:
    raise ExtensionError(explain(error, torch.__version__, torch.version.cuda)) from None

if TYPE_CHECKING:
    from fastdense._C import BuildInfo

__all__ = ["_C", "build_info"]


def build_info() -> "BuildInfo":
    """Returns what was compiled, and which code paths this machine uses.

    Returns:
        A dict of ``version``; ``torch``, the version compiled with; ``cuda`` and ``cuda_arch_list``, None in a build
        for the CPU alone; ``compiler``; ``simd``, the vector instructions in use; ``cuda_kernels``, the choice
        of FASTDENSE_CUDA_KERNELS; ``dependent_launch``, whether FASTDENSE_DEPENDENT_LAUNCH is 1; ``threads`` of this
        machine.
    """
    return _C.build_info()

# SPDX-License-Identifier: Apache-2.0
"""What operators say to a CUDA tensor in a build without CUDA, instead of the dispatcher's list of backends."""

from functools import partial
from typing import Any, NoReturn

import torch

from fastdense._extension import _C

HINT = "this build is for the CPU only; to run on a GPU, build again with FORCE_CUDA=1"  # as setup.py says


def _refuse(op: str, *arguments: Any, **options: Any) -> NoReturn:
    raise NotImplementedError(f"{op}: expected tensors on the CPU, got CUDA tensors: {HINT}")


if _C.build_info()["cuda"] is None:
    _library = torch.library.Library("fastdense", "IMPL", "CUDA")  # kept: its end would undo the registrations
    for _name in torch._C._dispatch_get_all_op_names():
        if _name.startswith("fastdense::"):
            _library.impl(_name, partial(_refuse, _name.removeprefix("fastdense::")))

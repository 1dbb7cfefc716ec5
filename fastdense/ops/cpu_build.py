# SPDX-License-Identifier: Apache-2.0
"""What operators without CUDA kernels say to a CUDA tensor, instead of the dispatcher's list of backends."""

from functools import partial
from typing import Any, NoReturn

import torch

from fastdense._extension import _C

HINT = "this build is for the CPU only; to run on a GPU, build again with FORCE_CUDA=1"  # as setup.py says


# In every build, with the operator that runs on CUDA devices too.
CPU_ONLY = {
    "dense_block_inference": "dense_block",
    "pack_dense_block": "dense_block",
    "dual_path_stage_inference": "dual_path_stage",
    "pack_dual_path_stage": "dual_path_stage",
}


def _refuse(op: str, hint: str, *arguments: Any, **options: Any) -> NoReturn:
    raise NotImplementedError(f"{op}: expected tensors on the CPU, got CUDA tensors: {hint}")


_library = torch.library.Library("fastdense", "IMPL", "CUDA")  # kept: its end would undo the registrations
for _name in torch._C._dispatch_get_all_op_names():
    _op = _name.removeprefix("fastdense::")
    if _op in CPU_ONLY:
        _library.impl(_name, partial(_refuse, _op, f"use fastdense.ops.{CPU_ONLY[_op]}"))
    elif _op != _name and _C.build_info()["cuda"] is None:
        _library.impl(_name, partial(_refuse, _op, HINT))

# SPDX-License-Identifier: Apache-2.0
"""Runs the block operators on CPU tensors by the CUDA code, its kernels emulated."""

import contextlib
import ctypes
import functools
import warnings
from collections.abc import Iterator

import pytest
import torch

from fastdense import _C
from tests.emulation.build import build_with_torch

OPERATORS = ("dense_block", "_dense_block_backward", "dual_path_stage", "_dual_path_stage_backward")
OPERATORS += ("norm_relu_max_pool", "_norm_relu_max_pool_backward", "update_running_stats_")
OPERATORS += ("residual_dense_block", "_residual_dense_block_backward")
SOURCES = [
    f"csrc/{op}/{op}{part}"
    for op in ("dense_block", "dual_path")
    for part in (".cpp", "_forward_cuda.cpp", "_backward_cuda.cpp")
]
SOURCES += [
    f"csrc/cuda/{op}/{op}_{step}.cu" for op in ("norm_relu", "norm_act", "conv1x1") for step in ("forward", "backward")
]
SOURCES += [
    f"csrc/dense_block/dense_block_conv_{stem}_kernels.cu" for stem in ("forward", "input_gradient", "weight_gradient")
]
SOURCES += [
    f"csrc/cuda/grouped_conv/grouped_conv_{stem}.cu" for stem in ("forward", "input_gradient", "weight_gradient")
]
SOURCES += [
    "csrc/core/activation_args.cpp",
    "csrc/cuda/kernel_choice.cpp",
    "csrc/core/sync_batch_norm.cpp",
    "csrc/norm_relu_max_pool/norm_relu_max_pool_kernels.cu",
    "csrc/residual_dense_block/residual_dense_block.cpp",
    "csrc/residual_dense_block/residual_dense_block_kernels.cu",
    "csrc/update_running_stats/update_running_stats_kernels.cu",
    "tests/emulation/blocks_entry.cpp",
]

# Of a fixture that says where a test's tensors live, entered by on_device().  Emulated devices run the library's way
# around products and convolutions, but for the fused ones.
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", "emulated", "emulated-backwards", CUDA]
FUSED_DEVICES = ["emulated-fused", "emulated-fused-backwards", CUDA]


@functools.cache
def _library() -> tuple[torch.library.Library, ctypes.CDLL]:
    """Builds the operators as those of another namespace."""
    namespace = torch.library.Library("fastdense_emulated", "DEF")
    for name in OPERATORS:
        schema = str(getattr(torch.ops.fastdense, name).default._schema)
        namespace.define(schema.replace("fastdense::", ""))
    path = str(build_with_torch(SOURCES))
    torch.ops.load_library(path)
    return namespace, ctypes.CDLL(path)


@contextlib.contextmanager
def emulated_kernels(
    backwards: bool,
    workspace_bytes: int,
    blocks: int,
    kernels: str = "library",
    early_copies: bool = False,
    tf32: bool = False,
) -> Iterator[ctypes.CDLL]:
    """Puts the CUDA code in the place of the CPU code.

    Args:
        backwards: the order of threads and blocks.
        workspace_bytes: what the activated prefix may take; little makes many chunks.
        blocks: what fills the device; few give every thread many rows, many a lot of partial sums.
        kernels: "auto", "fused" or "library".
        early_copies: when asynchronous copies land.
        tf32: whether products of float32 may round their factors.
    """
    _, library = _library()
    library.set_schedule(backwards, early_copies)
    library.set_device(ctypes.c_int64(workspace_bytes), ctypes.c_int64(blocks), tf32)
    library.set_kernels(kernels.encode())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors, and the emulation has one thread anyway
    torch.use_deterministic_algorithms(True)  # fills what at::empty gives with NaN
    replacement = torch.library.Library("fastdense", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            for name in OPERATORS:
                emulated = getattr(torch.ops.fastdense_emulated, name)
                replacement.impl(name, emulated, "CPU", allow_override=True)
        yield library
    finally:
        replacement._destroy()
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


@contextlib.contextmanager
def on_device(name: str, workspace_bytes: int) -> Iterator[str]:
    """The device of one of DEVICES; by the order of threads, many blocks share the rows of a reduction, or few blocks
    with many rows a thread."""
    if not name.startswith("emulated"):
        yield name
        return
    backwards, kernels = name.endswith("backwards"), "fused" if "fused" in name else "library"
    with emulated_kernels(backwards, workspace_bytes, 3 if backwards else 1000, kernels, early_copies=backwards):
        yield "cpu"


@contextlib.contextmanager
def chosen(kernels: str) -> Iterator[None]:
    """On a GPU; emulated devices have their own choice."""
    before = _C.build_info()["cuda_kernels"]
    _C.set_cuda_kernels(kernels)
    try:
        yield
    finally:
        _C.set_cuda_kernels(before)

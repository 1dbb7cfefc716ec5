# SPDX-License-Identifier: Apache-2.0
"""Every native operator passes torch.library.opcheck; one without samples fails."""

import pytest
import torch

from fastdense import _C
from fastdense.ops.cpu_build import CPU_ONLY, HINT
from tests.cases.operators import operators, samples
from tests.emulation.blocks import OPERATORS, emulated_kernels


@pytest.mark.parametrize("name", operators())
def test_opcheck(name):
    arguments = list(samples(name))
    assert arguments, f"{name} has no samples in tests/cases/operators.py"
    for sample in arguments:
        torch.library.opcheck(getattr(torch.ops.fastdense, name).default, sample)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_with_the_cuda_code(name):
    operator = getattr(torch.ops.fastdense, name).default
    arguments = list(samples(name))
    with emulated_kernels(False, workspace_bytes=12 << 10, blocks=8):
        for sample in arguments:
            torch.library.opcheck(operator, sample)


@pytest.mark.parametrize("name", CPU_ONLY)
def test_an_operator_of_the_cpu_says_so(name):
    operator = getattr(torch.ops.fastdense, name).default
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(NotImplementedError, match=f"got CUDA tensors: use fastdense.ops.{CPU_ONLY[name]}$"):
        operator.redispatch(cuda, *next(iter(samples(name))))


@pytest.mark.parametrize("name", [name for name in operators() if name not in CPU_ONLY])
def test_a_cpu_build_says_how_to_get_cuda_kernels(name):
    """What stands in the place of the kernels, called as for CUDA tensors; in a build for CUDA they are there."""
    operator = getattr(torch.ops.fastdense, name).default
    if _C.build_info()["cuda"] is not None:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastdense::{name}", "CUDA")
        return
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(NotImplementedError, match=f"^{name}: expected tensors on the CPU, got CUDA tensors: {HINT}$"):
        operator.redispatch(cuda, *next(iter(samples(name))))


def test_the_library_is_what_is_documented():
    assert operators() == [
        "_bicubic_backward",
        "_dense_block_backward",
        "_dual_path_stage_backward",
        "_highway_gate_backward",
        "_norm_relu_max_pool_backward",
        "_residual_dense_block_backward",
        "bicubic",
        "bicubic_uint8",
        "dense_block",
        "dense_block_inference",
        "dropout_mask",
        "dual_path_merge",
        "dual_path_split",
        "dual_path_stage",
        "dual_path_stage_inference",
        "highway_gate",
        "mean_join",
        "norm_relu_max_pool",
        "pack_dense_block",
        "pack_dual_path_stage",
        "residual_dense_block",
        "update_running_stats_",
    ]

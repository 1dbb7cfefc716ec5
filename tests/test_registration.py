# SPDX-License-Identifier: Apache-2.0
"""Every native operator passes torch.library.opcheck; one without samples fails."""

import pytest
import torch

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
    with emulated_kernels(False, scratch_bytes=12 << 10, blocks=8):
        test_opcheck(name)


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
        "dropout_mask",
        "dual_path_merge",
        "dual_path_split",
        "dual_path_stage",
        "highway_gate",
        "mean_join",
        "norm_relu_max_pool",
        "residual_dense_block",
        "update_running_stats_",
    ]

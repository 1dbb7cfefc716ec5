# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the dual path merge and split, run on the host: bit-equal to the CPU kernels."""

import ctypes
import itertools

import pytest
import torch

import fastdense  # noqa: F401  (registers the operators)
from tests.emulation.build import build

FLOATS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
WIDTHS = [(4, 5, 3), (0, 7, 2), (6, 0, 1), (70, 40, 20), (3, 2, 0)]  # residual, dense and new elements of a row
ROWS = 37
POISON = 77


@pytest.fixture(scope="module")
def kernels():
    return build("dual_path_merge")


def pointers(*tensors):
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


def check(kernels) -> None:
    for (r, d, k), dtype in itertools.product(WIDTHS, FLOATS):
        x, z = torch.randn(ROWS, r + d).to(dtype), torch.randn(ROWS, r + k).to(dtype)
        y, dx, dz = (torch.full((ROWS, n), POISON, dtype=dtype) for n in (r + d + k, r + d, r + k))
        rest = [ctypes.c_int64(n) for n in (r, d, k, y.numel())]
        assert getattr(kernels, f"merge_{FLOATS[dtype]}")(*pointers(x, z, y), *rest) == 0
        assert torch.equal(y, torch.ops.fastdense.dual_path_merge(x, z, r))
        assert getattr(kernels, f"split_{FLOATS[dtype]}")(*pointers(y, dx, dz), *rest) == 0
        expected = torch.ops.fastdense.dual_path_split(y, r + d, r)
        assert torch.equal(dx, expected[0])
        assert torch.equal(dz, expected[1])


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_kernels(kernels, backwards):
    kernels.set_backwards(backwards)
    before = kernels.launches()
    check(kernels)
    assert kernels.launches() == before + 2 * len(WIDTHS) * len(FLOATS)


@pytest.mark.parametrize("plant", [("for_each(count, Path", "for_each(count - 1, Path")])
def test_planted_mistakes_are_noticed(plant):
    broken = build("dual_path_merge", plant)
    with pytest.raises(AssertionError):
        check(broken)

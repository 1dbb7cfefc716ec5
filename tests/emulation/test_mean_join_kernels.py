# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of the fractal join, run on the host: bit-equal to the CPU kernels."""

import ctypes
import itertools

import pytest
import torch

import fastdense  # noqa: F401  (registers the operators)
from tests.emulation.build import build

FLOATS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SIZES = [1, 15, 300]
COUNTS = [1, 2, 3, 16]
POISON = 77


@pytest.fixture(scope="module")
def kernels():
    return build("mean_join")


def check(kernels) -> None:
    for size, count, dtype in itertools.product(SIZES, COUNTS, FLOATS):
        inputs = [torch.randn(1, size).to(dtype) for _ in range(count)]
        made = torch.full((1, size), POISON, dtype=dtype)
        pointers = (ctypes.c_void_p * count)(*(x.data_ptr() for x in inputs))
        run = getattr(kernels, f"join_{FLOATS[dtype]}")
        assert run(pointers, count, ctypes.c_void_p(made.data_ptr()), ctypes.c_int64(size)) == 0
        assert torch.equal(made, torch.ops.fastdense.mean_join(inputs))


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_kernels(kernels, backwards):
    kernels.set_backwards(backwards)
    before = kernels.launches()
    check(kernels)
    assert kernels.launches() == before + len(SIZES) * len(COUNTS) * len(FLOATS)


@pytest.mark.parametrize("plant", [("for_each(count, join", "for_each(count - 1, join")])
def test_planted_mistakes_are_noticed(plant):
    broken = build("mean_join", plant)
    with pytest.raises(AssertionError):
        check(broken)

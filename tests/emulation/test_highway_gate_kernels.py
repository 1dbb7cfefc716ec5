# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the highway gate, run on the host: bit-equal to the CPU kernels."""

import ctypes
import itertools

import pytest
import torch

from fastdense.ops.highway_gate import ACTIVATIONS
from tests.emulation.build import build

FLOATS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SHAPES = [(1, 1), (3, 5), (2, 3, 7, 5), (70, 3, 2, 2)]
POISON = 77


@pytest.fixture(scope="module")
def kernels():
    return build("highway_gate")


def pointers(*tensors):
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


def check(kernels) -> None:
    for shape, activation, dtype in itertools.product(SHAPES, ACTIVATIONS, FLOATS):
        wide = (shape[0], 2 * shape[1], *shape[2:])
        x, grad = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        projection = torch.randn(wide, dtype=dtype)
        y, dx, dp = (torch.full(size, POISON, dtype=dtype) for size in (shape, shape, wide))
        block = ctypes.c_int64(x[0].numel())
        rest = block, ACTIVATIONS.index(activation), ctypes.c_int64(x.numel())
        assert getattr(kernels, f"forward_{FLOATS[dtype]}")(*pointers(x, projection, y), *rest) == 0
        assert getattr(kernels, f"backward_{FLOATS[dtype]}")(*pointers(grad, x, projection, dx, dp), *rest) == 0
        assert torch.equal(y, torch.ops.fastdense.highway_gate(x, projection, activation))
        expected = torch.ops.fastdense._highway_gate_backward(grad, x, projection, activation)
        assert torch.equal(dx, expected[0])
        assert torch.equal(dp, expected[1])


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_kernels(kernels, backwards):
    kernels.set_backwards(backwards)
    before = kernels.launches()
    check(kernels)
    assert kernels.launches() == before + 2 * len(SHAPES) * len(ACTIVATIONS) * len(FLOATS)


@pytest.mark.parametrize("plant", [("for_each(count, gate", "for_each(count - 1, gate")])
def test_planted_mistakes_are_noticed(plant):
    broken = build("highway_gate", plant)
    with pytest.raises(AssertionError):
        check(broken)

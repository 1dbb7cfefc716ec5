# SPDX-License-Identifier: Apache-2.0
"""Scalar functions shared by all kernels, against torch and hand-worked values."""

import math

import numpy
import pytest
import torch

from fastdense import _C

TWO_BYTE = [
    pytest.param(torch.bfloat16, _C.scalar.load_bfloat16, _C.scalar.store_bfloat16, id="bfloat16"),
    pytest.param(torch.float16, _C.scalar.load_half, _C.scalar.store_half, id="half"),
]


def every_bit_pattern(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def bits(values: torch.Tensor) -> list[int]:
    return [value & 0xFFFF for value in values.view(torch.int16).tolist()]


@pytest.mark.parametrize(("dtype", "load", "store"), TWO_BYTE)
def test_load_widens_every_bit_pattern_exactly(dtype, load, store):
    values = every_bit_pattern(dtype)
    loaded = torch.tensor([load(pattern) for pattern in bits(values)], dtype=torch.float32)
    torch.testing.assert_close(loaded, values.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(loaded.signbit(), values.float().signbit())


@pytest.mark.parametrize(("dtype", "load", "store"), TWO_BYTE)
def test_store_returns_every_loaded_number(dtype, load, store):
    numbers = every_bit_pattern(dtype)
    numbers = numbers[~numbers.isnan()]
    assert [store(value) for value in numbers.float().tolist()] == bits(numbers)


@pytest.mark.parametrize(("dtype", "load", "store"), TWO_BYTE)
def test_store_rounds_like_torch_between_neighbours(dtype, load, store):
    numbers = every_bit_pattern(dtype)
    low = numbers[numbers.isfinite() & (numbers >= 0)].float().sort().values
    high = torch.cat([low[1:], 2 * low[-1:] - low[-2:-1]])
    ties = (low + high) / 2
    below, above = ties.nextafter(low), ties.nextafter(high)
    for values in (ties, below, above, -ties):
        assert [store(value) for value in values.tolist()] == bits(values.to(dtype))


@pytest.mark.parametrize(("dtype", "load", "store"), TWO_BYTE)
def test_store_of_special_values(dtype, load, store):
    values = torch.tensor([math.inf, -math.inf, 3.4e38, -3.4e38, 65520.0, 65519.996, 1e-45, -1e-45])
    assert [store(value) for value in values.tolist()] == bits(values.to(dtype))


@pytest.mark.parametrize(("dtype", "load", "store"), TWO_BYTE)
@pytest.mark.parametrize("pattern", [0x7F800001, 0x7FFFFFFF, 0x7FC00000, 0xFF800001, 0xFFFFFFFF])
def test_nan_stays_nan(dtype, load, store, pattern):
    nan = float(numpy.array(pattern, dtype=numpy.uint32).view(numpy.float32))
    assert math.isnan(load(store(nan)))


@pytest.mark.parametrize("suffix", ["", "_float"])
def test_relu_agrees_with_torch(suffix):
    relu = getattr(_C.scalar, "relu" + suffix)
    passes = getattr(_C.scalar, "relu_passes" + suffix)
    values = torch.tensor([-math.inf, -1.5, -0.0, 0.0, 1e-40, 2.5, math.inf, math.nan])
    values.requires_grad_()
    expected = values.relu()
    (grad,) = torch.autograd.grad(expected.sum(), values)
    actual = torch.tensor([relu(value) for value in values.tolist()])
    torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=0, equal_nan=True)
    assert [passes(value) for value in values.tolist()] == (grad != 0).tolist()


def test_mul_add_rounds_twice_on_the_host():
    near_one = 1 + 2.0**-12
    product_then_sum = numpy.float32(near_one) * numpy.float32(near_one) - numpy.float32(1)
    assert _C.scalar.mul_add_float(near_one, near_one, -1.0) == product_then_sum == 2.0**-11
    assert _C.scalar.mul_add(near_one, near_one, -1.0) == 2.0**-11 + 2.0**-24

# SPDX-License-Identifier: Apache-2.0
"""The join of a fractal against the mean of a stack."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fastdense import reference
from fastdense.ops import mean_join
from tests.cases.simd import available_levels, simd_level

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (5, 3), (2, 3, 7), (2, 3, 5, 4), (2, 3, 2, 3, 4), (3, 5, 41, 43)]
COUNTS = [1, 2, 3, 5, 16]


def tensors(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for _ in range(count)]


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(device, shape, count):
    inputs = [x.to(device).requires_grad_() for x in tensors(count, shape)]
    grad = torch.randn(shape, dtype=torch.float64, device=device)
    expected = reference.mean_join(inputs)
    made = mean_join(inputs)
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(
        torch.autograd.grad(made, inputs, grad), torch.autograd.grad(expected, inputs, grad), rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_added_up_in_order_and_rounded_once(device, dtype, count):
    inputs = [x.to(device) for x in tensors(count, (3, 4, 19), dtype)]
    wide = [x if dtype == torch.float64 else x.float() for x in inputs]
    total = wide[0]
    for x in wide[1:]:
        total = total + x
    made = mean_join(inputs)
    assert made.dtype == dtype
    assert torch.equal(made, (total / count).to(dtype))


def test_gradients_of_any_order():
    inputs = [x.requires_grad_() for x in tensors(3, (2, 3, 2))]
    assert torch.autograd.gradcheck(lambda *xs: mean_join(xs), inputs)
    assert torch.autograd.gradgradcheck(lambda *xs: mean_join(xs).square(), inputs)


def test_forward_mode():
    (x, y), (t,) = tensors(2, (2, 3)), tensors(1, (2, 3))
    with forward_ad.dual_level():
        made = forward_ad.unpack_dual(mean_join([forward_ad.make_dual(x, t), y]))
    torch.testing.assert_close(made.primal, (x + y) / 2)
    torch.testing.assert_close(made.tangent, t / 2)


def test_vmap():
    x, y = tensors(2, (4, 2, 3))
    made = torch.vmap(lambda a, b: mean_join([a, b, x[0]]), in_dims=(0, None))(x, y[0])
    torch.testing.assert_close(made, (x + y[0] + x[0]) / 3)


def test_one_gradient_for_all_and_none_for_the_others():
    inputs = tensors(3, (2, 3))
    inputs[0].requires_grad_()
    inputs[2].requires_grad_()
    mean_join(inputs).sum().backward()
    assert inputs[1].grad is None
    for x in (inputs[0], inputs[2]):
        torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 3))
    first, second = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    grads = torch.autograd.grad(mean_join([first, second]), [first, second], torch.ones(2, 3))
    assert grads[0].data_ptr() == grads[1].data_ptr()


def test_nothing_is_kept():
    saved = []
    inputs = [x.requires_grad_() for x in tensors(3, (2, 3))]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mean_join(inputs)
    assert saved == []


def test_the_same_tensor_twice():
    x = torch.randn(2, 3, requires_grad=True)
    mean_join([x, x, x]).backward(torch.ones(2, 3))
    torch.testing.assert_close(x.grad, torch.ones(2, 3))


def test_any_strides_and_the_layout_of_the_first():
    plain = tensors(3, (2, 6, 5, 4))
    expected = mean_join(plain)
    strided = [torch.stack([x, x], -1)[..., 0] for x in plain]
    last = [channels_last(x) for x in plain]
    for first, second, third in itertools.product(*zip(plain, strided, last, strict=True)):
        made = mean_join([first, second, third])
        assert torch.equal(made, expected)
        wanted = torch.channels_last if first is last[0] else torch.contiguous_format
        assert made.is_contiguous(memory_format=wanted)
    assert torch.equal(mean_join([plain[0], plain[1][:1].expand(2, -1, -1, -1)]), (plain[0] + plain[1][:1]) / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_and_threads_give_the_same_bits(dtype):
    inputs = tensors(4, (5, 7, 31, 29), dtype)  # more elements than a thread takes at once
    threads, results = torch.get_num_threads(), []
    try:
        for level, count in itertools.product(available_levels(), (1, 2)):
            torch.set_num_threads(count)
            with simd_level(level):
                results.append(mean_join(inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_nan_and_infinity():
    inputs = [torch.tensor([[1.0, torch.nan, torch.inf, torch.inf]]), torch.tensor([[2.0, 1.0, 1.0, -torch.inf]])]
    assert mean_join(inputs).isnan().tolist() == [[False, True, False, True]]
    assert mean_join(inputs)[0, 2] == torch.inf


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(device, shape):
    inputs = [torch.zeros(shape, device=device, requires_grad=True) for _ in range(2)]
    made = mean_join(inputs)
    assert made.shape == shape
    made.sum().backward()
    assert inputs[0].grad.shape == shape


def test_autocast_takes_the_widest_dtype():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert mean_join([x.bfloat16(), y.bfloat16()]).dtype == torch.bfloat16
        assert torch.equal(mean_join([x.bfloat16(), y]), (x.bfloat16().float() + y) / 2)


def test_compiles_with_a_changing_batch():
    joined = torch.compile(lambda *xs: mean_join(xs), fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        inputs = [x.requires_grad_() for x in tensors(3, (batch, 4, 5))]
        made = joined(*inputs)
        torch.testing.assert_close(made, reference.mean_join(inputs))
        made.sum().backward()
        torch.testing.assert_close(inputs[1].grad, torch.full_like(inputs[1], 1 / 3))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([], ValueError, "inputs to be 1 to 16 tensors, got 0"),
        ([torch.zeros(1, 1)] * 17, ValueError, "inputs to be 1 to 16 tensors, got 17"),
        ([torch.zeros(2, 3).long()], TypeError, r"inputs\[0\] to be float32, float64, float16 or bfloat16, got int64"),
        ([torch.zeros(2)], ValueError, r"inputs\[0\] to have at least 2 dimensions, got shape \[2\]"),
        (
            [torch.zeros(2, 3), torch.zeros(2, 3).double()],
            TypeError,
            r"inputs\[1\] to be float32 like inputs\[0\], got float64",
        ),
        (
            [torch.zeros(2, 3)] * 2 + [torch.zeros(3, 2)],
            ValueError,
            r"inputs\[2\] to have shape \[2, 3\], got \[3, 2\]",
        ),
    ],
)
def test_errors(inputs, error, message):
    with pytest.raises(error, match=f"^mean_join: expected {message}"):
        mean_join(inputs)

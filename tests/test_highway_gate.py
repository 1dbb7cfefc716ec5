# SPDX-License-Identifier: Apache-2.0
"""highway_gate against its formula, in torch operators and on single numbers."""

import itertools
import math

import pytest
import torch

from fastdense import _C
from fastdense.ops import highway_gate
from fastdense.ops.highway_gate import ACTIVATIONS
from tests.cases.highway_gate import DTYPES, reference
from tests.cases.simd import available_levels, simd_level


def layouts(t):
    """The same numbers with different strides."""
    yield t
    yield torch.stack([t, t], -1)[..., 0]
    yield t.transpose(0, 1).contiguous().transpose(0, 1)
    if t.dim() > 2:
        yield t.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (2, 3, 7), (2, 3, 5, 4), (2, 3, 2, 3, 4), (3, 2, 1, 1)])
def test_formula_and_gradient(device, activation, shape):
    wide = (shape[0], 2 * shape[1], *shape[2:])
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    projection = torch.randn(wide, dtype=torch.float64, device=device, requires_grad=True)
    grad = torch.randn(shape, dtype=torch.float64, device=device)
    expected = reference(x, projection, activation)
    wanted = torch.autograd.grad(expected, (x, projection), grad)
    made = highway_gate(x, projection, activation)
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(torch.autograd.grad(made, (x, projection), grad), wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    projection = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: highway_gate(*args, activation), (x, projection))


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5, 4)])
def test_any_strides_give_the_same_numbers(shape):
    x, grad = torch.randn(shape), torch.randn(shape)
    projection = torch.randn(shape[0], 2 * shape[1], *shape[2:])
    expected = highway_gate(x, projection)
    wanted = torch.ops.fastdense._highway_gate_backward(grad, x, projection, "relu")
    for y, p, g in itertools.product(layouts(x), layouts(projection), layouts(grad)):
        made = highway_gate(y, p)
        grads = torch.ops.fastdense._highway_gate_backward(g, y, p, "relu")
        for a, b in zip((made, *grads), (expected, *wanted), strict=True):
            assert torch.equal(a, b)
            assert a.is_contiguous() or (len(shape) > 2 and a.is_contiguous(memory_format=torch.channels_last))


def test_memory_format_follows_the_projection():
    projection = torch.randn(2, 6, 5, 4).to(memory_format=torch.channels_last)
    made = highway_gate(torch.randn(2, 3, 5, 4), projection)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert highway_gate(torch.randn(2, 3, 5, 4), projection.contiguous()).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dtypes_round_once(device, dtype, activation):
    x, grad = torch.randn(4, 6, 9).to(dtype), torch.randn(4, 6, 9).to(dtype)
    projection = (3 * torch.randn(4, 12, 9)).to(dtype)
    exact_x, exact_projection = x.double().requires_grad_(), projection.double().requires_grad_()
    expected = reference(exact_x, exact_projection, activation)
    wanted = torch.autograd.grad(expected, (exact_x, exact_projection), grad.double())
    arguments = [t.to(device) for t in (x, projection)]
    made = highway_gate(*arguments, activation)
    grads = torch.ops.fastdense._highway_gate_backward(grad.to(device), *arguments, activation)
    for a, b in zip((made, *grads), (expected, *wanted), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.cpu(), b.detach().to(dtype))


def test_extreme_gates_copy_and_replace():
    x, first = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    closed = torch.cat([first, torch.full_like(first, -40)], 1)
    assert torch.equal(highway_gate(x, closed), x)
    opened = torch.cat([first, torch.full_like(first, 40)], 1)
    torch.testing.assert_close(highway_gate(x, opened), first.relu())
    even = torch.cat([first, torch.zeros_like(first)], 1)
    torch.testing.assert_close(highway_gate(x, even), (x + first.relu()) / 2)


def test_gate_open_to_rounding_still_learns():
    """In float32 1 - sigmoid(20) is 0 if subtracted; its true value is 2.06e-9."""
    x, second = torch.zeros(1, 1, requires_grad=True), torch.full((1, 1), 20.0, requires_grad=True)
    highway_gate(x, torch.cat([torch.ones(1, 1), second], 1)).sum().backward()
    torch.testing.assert_close(x.grad.item(), 1 / (1 + math.exp(20)), rtol=1e-6, atol=0)
    torch.testing.assert_close(second.grad.item(), 1 / (1 + math.exp(20)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("suffix", ["", "_float"])
def test_scalar_functions(suffix):
    def output(activation, *values):
        return getattr(_C.scalar, f"highway_output_{activation}{suffix}")(*values)

    def gradients(activation, *values):
        return getattr(_C.scalar, f"highway_gradients_{activation}{suffix}")(*values)

    assert output("relu", 1.0, 3.0, 0.0) == 2.0
    assert output("relu", 1.0, -3.0, 0.0) == 0.5
    assert output("identity", 1.0, -3.0, 0.0) == -1.0
    assert output("tanh", 0.0, 0.5, 0.0) == pytest.approx(math.tanh(0.5) / 2, rel=1e-6)
    assert gradients("relu", 2.0, 1.0, 3.0, 0.0) == [1.0, 1.0, 1.0]
    assert gradients("relu", 2.0, 1.0, -3.0, 0.0) == [1.0, 0.0, -0.5]
    assert gradients("identity", 2.0, 1.0, -3.0, 0.0) == [1.0, 1.0, -2.0]
    slope = 1 - math.tanh(0.5) ** 2
    assert gradients("tanh", 2.0, 0.0, 0.5, 0.0) == pytest.approx([1.0, slope, math.tanh(0.5) / 2], rel=1e-6)
    for second in (-1000.0, 1000.0, -math.inf, math.inf):
        opened = second > 0
        assert output("relu", 1.0, 3.0, second) == (3.0 if opened else 1.0)
        assert gradients("relu", 2.0, 1.0, 3.0, second) == [0.0 if opened else 2.0, 2.0 if opened else 0.0, 0.0]


@pytest.mark.parametrize(("suffix", "least", "dtype"), [("", -708, torch.float64), ("_float", -87, torch.float32)])
def test_exponential(suffix, least, dtype):
    exponential = getattr(_C.scalar, "exp_of_nonpositive" + suffix)
    values = torch.cat([torch.linspace(least, 0, 20001), torch.linspace(-2, 0, 20001), -(0.1 ** torch.arange(0, 9))])
    values = values.to(dtype).clamp(min=least)
    made = torch.tensor([exponential(v) for v in values.tolist()], dtype=torch.float64)
    exact = torch.tensor([math.exp(v) for v in values.tolist()], dtype=torch.float64)
    assert ((made - exact).abs() / exact).max() < 2 * torch.finfo(dtype).eps
    assert exponential(0.0) == exponential(-0.0) == 1.0
    assert exponential(1.01 * least) == exponential(-1e30) == exponential(-math.inf) == 0.0
    assert math.isnan(exponential(math.nan))


@pytest.mark.parametrize(("suffix", "dtype"), [("", torch.float64), ("_float", torch.float32)])
def test_tanh(suffix, dtype):
    tanh = getattr(_C.scalar, "highway_tanh" + suffix)
    values = torch.cat([torch.linspace(-30, 30, 20001), torch.linspace(-1, 1, 20001), 0.1 ** torch.arange(0, 30)])
    values = values.to(dtype)
    made = torch.tensor([tanh(v) for v in values.tolist()], dtype=torch.float64)
    exact = torch.tensor([math.tanh(v) for v in values.tolist()], dtype=torch.float64)
    assert ((made - exact).abs() <= 3 * torch.finfo(dtype).eps * exact.abs()).all()
    assert [tanh(v) for v in (0.0, math.inf, -math.inf, 1e30, -1e30)] == [0.0, 1.0, -1.0, 1.0, -1.0]
    assert math.isnan(tanh(math.nan))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(place, activation):
    values = [torch.zeros(1, 1) for _ in range(3)]
    values[place].fill_(math.nan)
    assert highway_gate(values[0], torch.cat(values[1:], 1), activation).isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(device, shape):
    x = torch.zeros(shape, device=device, requires_grad=True)
    projection = torch.zeros(shape[0], 2 * shape[1], shape[2], device=device, requires_grad=True)
    made = highway_gate(x, projection)
    assert made.shape == shape
    made.sum().backward()
    assert x.grad.shape == shape
    assert projection.grad.shape == projection.shape


def test_does_not_depend_on_the_number_of_threads():
    x, projection = torch.randn(7, 13, 31, 29), torch.randn(7, 26, 31, 29)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(highway_gate(x, projection))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_instruction_sets_give_the_same_bits(dtype, activation):
    x, grad = torch.randn(3, 5, 7, dtype=dtype), torch.randn(3, 5, 7, dtype=dtype)
    projection = 3 * torch.randn(3, 10, 7, dtype=dtype)
    results = []
    for level in available_levels():
        with simd_level(level):
            made = highway_gate(x, projection, activation)
            grads = torch.ops.fastdense._highway_gate_backward(grad, x, projection, activation)
            results.append((made, *grads))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


def test_only_input_and_projection_are_kept():
    x, projection = torch.randn(4, 8, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made = highway_gate(x, projection)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), projection.data_ptr()}
    made.sum().backward()


def test_gradients_of_one_argument_only():
    x, projection = torch.randn(2, 3), torch.randn(2, 6)
    for wanted, other in ((x, projection), (projection, x)):
        wanted.requires_grad_()
        highway_gate(x, projection).sum().backward()
        assert wanted.grad is not None
        assert other.grad is None
        wanted.requires_grad_(False)
        wanted.grad = None


def test_double_backward_raises():
    x, projection = torch.randn(2, 3, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(highway_gate(x, projection).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="highway_gate: double backward is not supported"):
        grad.sum().backward()


def test_autocast_takes_the_projections_dtype():
    x, conv = torch.randn(2, 3, 5, 5), torch.nn.Conv2d(3, 6, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert highway_gate(x, conv(x)).dtype == torch.bfloat16


@pytest.mark.gpu
def test_cuda_graph():
    x, projection = torch.randn(4, 8, device="cuda"), torch.randn(4, 16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = highway_gate(x, projection)
    x.fill_(2)
    graph.replay()
    torch.testing.assert_close(made, reference(x, projection, "relu"))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"input": torch.zeros(2, 3, dtype=torch.int64)},
            TypeError,
            "input to be float32, float64, float16 or bfloat16",
        ),
        ({"projection": torch.zeros(2, 6).double()}, TypeError, "projection to be float32 like input, got float64"),
        ({"projection": torch.zeros(2, 5)}, ValueError, r"projection to have shape \[2, 6\], got \[2, 5\]"),
        ({"projection": torch.zeros(2, 6, 1)}, ValueError, r"projection to have shape \[2, 6\], got \[2, 6, 1\]"),
        ({"input": torch.zeros(2)}, ValueError, r"input to have at least 2 dimensions, got shape \[2\]"),
        ({"activation": "selu"}, ValueError, "activation to be one of relu, tanh, identity, got selu"),
    ],
)
def test_wrong_arguments(changed, error, message):
    arguments = {"input": torch.zeros(2, 3), "projection": torch.zeros(2, 6), "activation": "relu"} | changed
    with pytest.raises(error, match=f"^highway_gate: expected {message}"):
        highway_gate(**arguments)


def test_wrong_gradients():
    x, projection = torch.zeros(2, 3), torch.zeros(2, 6)
    with pytest.raises(ValueError, match=r"_highway_gate_backward: expected grad_output to have shape \[2, 3\]"):
        torch.ops.fastdense._highway_gate_backward(torch.zeros(3, 2), x, projection, "relu")
    with pytest.raises(TypeError, match="_highway_gate_backward: expected grad_output to be float32"):
        torch.ops.fastdense._highway_gate_backward(torch.zeros(2, 3).double(), x, projection, "relu")

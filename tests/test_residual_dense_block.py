# SPDX-License-Identifier: Apache-2.0
"""The residual dense block against concatenation: CPU, CUDA, and the CUDA code with emulated kernels."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fastdense import _C, reference
from fastdense.ops import ConvWeights
from tests.cases.residual_dense_block import Block, Case, ramp, results
from tests.cases.simd import available_levels, simd_level
from tests.emulation.blocks import DEVICES, on_device

# Whole images, one image, or stripes of several lines or of one, by the case and the layer.
EMULATED_SCRATCH = 4 << 10


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a test's tensors live."""
    with on_device(request.param, EMULATED_SCRATCH) as device:
        yield device


CASES = {
    "esrgan": Case(channels=64, growth=32, layers=4, size=(9, 8), outer=True),
    "rdn": Case(channels=8, growth=8, kernel=1, slope=0.0),
    "wide": Case(channels=3, growth=2, size=(3, 130), batch=1),
    "tall": Case(channels=40, growth=40, layers=2, size=(70, 3)),
    "one-layer": Case(layers=1, bias=False),
    "one-pixel": Case(size=(1, 1), outer=True),
    "one-row": Case(size=(1, 50), kernel=1),
    "many-channels": Case(channels=300, growth=33, layers=1, size=(3, 4)),
    "srdensenet": Case(channels=6, growth=3, layers=4, slope=0.0, fusion=False, first=(0, 6, 0, 12)),
    "no-fusion": Case(fusion=False),
    "many-images": Case(channels=4, growth=2, size=(4, 5), batch=5, outer=True),
    "own-features": Case(first=(0, 5, 5), outer=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(device, case):
    block = Block(case, device=device)
    for made, expected in zip(results(block), results(block, reference.residual_dense_block), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-10)


TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
# A slope near 1: rounding may turn the sign of a value near 0, which must not cost much.
TYPED = Case(channels=16, growth=24, layers=2, size=(7, 9), slope=0.9, outer=True)


def check_rounding(block: Block, made: list[Tensor]) -> None:
    """The error against float64 is not much larger than that of torch's own operators."""
    exact = results(block.to(torch.float64), reference.residual_dense_block)
    plain = results(block, reference.residual_dense_block)
    for ours, theirs, expected in zip(made, plain, exact, strict=True):
        assert ours.dtype == block.input.dtype
        error = (ours.double() - expected).norm()
        allowed = 2 * (theirs.double() - expected).norm() + 8 * torch.finfo(ours.dtype).eps * expected.norm()
        assert error <= allowed


@pytest.mark.parametrize("level", available_levels())
@TYPES
def test_every_type_at_every_level(level, dtype):
    block = Block(TYPED, dtype)
    with simd_level(level):
        made = results(block)
    check_rounding(block, made)


@TYPES
@pytest.mark.parametrize("growth", [24, 12, 7])  # slices that are aligned to 16 bytes, to some, to one element
def test_every_type_and_alignment(device, growth, dtype):
    block = Block(TYPED._replace(growth=growth), dtype, device)
    check_rounding(block, results(block))


def test_strides_of_input_outer_and_gradient_do_not_matter(device):
    block = Block(Case(outer=True), device=device)
    expected = results(block)

    def spread(t):
        return torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(-2)[..., ::2].detach().requires_grad_()

    for change in (spread, lambda t: t.detach().to(memory_format=torch.channels_last).requires_grad_()):
        other = copy.copy(block)
        other.input, other.outer = change(block.input), change(block.outer)
        out = other.run()
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, expected[0])
    out = block.run()
    for made, wanted in zip(
        torch.autograd.grad(out.sum(), block.tensors()),
        torch.autograd.grad(block.run(reference.residual_dense_block).sum(), block.tensors()),
        strict=True,
    ):
        torch.testing.assert_close(made, wanted)


@pytest.mark.parametrize(
    "case",
    [
        Case(channels=2, growth=2, layers=2, size=(2, 3), batch=1, outer=True),
        Case(channels=2, growth=3, layers=2, size=(3, 2), batch=1, kernel=1, slope=0.0, bias=False),
        Case(channels=2, growth=2, layers=2, size=(2, 2), batch=1, fusion=False, first=(0, 2)),
    ],
)
def test_gradcheck(device, case):
    block = Block(case, device=device)
    positions = block.tensors()

    def run(*tensors):
        return block.run()

    assert torch.autograd.gradcheck(run, positions, nondet_tol=0.0)


@pytest.mark.parametrize("wanted", range(10))
def test_any_one_gradient_alone(device, wanted):
    block = Block(Case(outer=True), device=device)
    expected = results(block, reference.residual_dense_block)[1 + wanted]
    for at, tensor in enumerate(block.tensors()):
        tensor.requires_grad_(at == wanted)
    out = block.run()
    torch.testing.assert_close(torch.autograd.grad(out, block.tensors()[wanted], ramp(out))[0], expected)


def test_reruns_are_bit_identical(device):
    block = Block(Case(channels=20, growth=7, size=(20, 20)), torch.float32, device)
    for first, second in zip(results(block), results(block), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("size", [(51, 103), (1, 1), (1, 98), (97, 1)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_many_tiles_with_odd_edges(size, kernel):
    block = Block(Case(channels=33, growth=2, layers=2, size=size, batch=3, kernel=kernel, outer=True))
    for made, expected in zip(results(block), results(block, reference.residual_dense_block), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-10)


def test_threads_and_cuts_at_even_pixels_change_no_bit():
    """What lets pictures be enlarged in stripes."""
    block = Block(Case(channels=20, growth=7, layers=2, size=(60, 52), batch=1), torch.float32)
    whole = block.run()
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    assert torch.equal(block.run(), whole)
    torch.set_num_threads(threads)
    block.input = block.input.detach()[:, :, 20:50]
    assert torch.equal(block.run()[:, :, 4:-4], whole[:, :, 24:46])


def test_not_finite_values_stay(device):
    block = Block(Case(size=(5, 5)), device=device)
    block.input.data[0, 0, 2, 2] = torch.nan
    made, expected = block.run(), block.run(reference.residual_dense_block)
    assert torch.equal(made.isnan(), expected.isnan())


@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 5, 0, 4)])
@pytest.mark.parametrize("fusion", [True, False])
def test_empty_batches(device, fusion, shape):
    block = Block(Case(fusion=fusion), device=device)
    block.input = torch.zeros(shape, dtype=torch.float64, device=device, requires_grad=True)
    out = block.run()
    assert out.shape == (shape if fusion else (shape[0], 14, *shape[2:]))
    grads = torch.autograd.grad(out.sum(), block.tensors())
    assert all(grad.shape == t.shape and not grad.any() for grad, t in zip(grads, block.tensors(), strict=True))


@pytest.mark.parametrize("fusion", [True, False])
def test_only_the_buffer_is_kept(device, fusion):
    block = Block(Case(channels=8, growth=4, layers=4, size=(10, 10), fusion=fusion), torch.float32, device)
    parameters = {t.untyped_storage().data_ptr() for t in block.tensors()}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block.run()
    sizes = [size for pointer, size in kept.items() if pointer not in parameters and size]
    assert sizes == [4 * 2 * 100 * (8 + 4 * 4)]


def test_editing_the_buffer_raises_in_backward(device):
    block = Block(Case(fusion=False), device=device)
    out = block.run()
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_double_backward_raises(device):
    block = Block(Case(), device=device)
    grad = torch.autograd.grad(block.run().square().sum(), block.input, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="residual_dense_block: double backward is not supported"):
        grad.sum().backward()


def changed(change) -> Block:
    block = Block(Case())
    change(block)
    return block


def set_layer(block, at, weight=None, bias=None):
    old = block.layers[at]
    block.layers[at] = ConvWeights(old.weight if weight is None else weight, old.bias if bias is None else bias)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda b: setattr(b, "input", b.input[0]),
            ValueError,
            r"input to have 4 dimensions \[N, C, H, W\], got",
        ),
        (lambda b: setattr(b, "input", b.input[:, :4]), ValueError, r"input to have 5 channels in dimension 1, got"),
        (lambda b: setattr(b, "input", b.input.float()), TypeError, r"input to be torch.float64 like the convolution"),
        (lambda b: setattr(b, "input", 3), TypeError, r"input to be a tensor, got int"),
        (lambda b: setattr(b, "outer", b.input[:, :, 1:]), ValueError, r"outer to have shape \[2, 5, 6, 7\], got"),
        (lambda b: setattr(b, "outer", b.input.float()), TypeError, r"input to be torch.float64 like the conv"),
        (lambda b: b.options.update(negative_slope=-0.1), ValueError, r"negative_slope to be finite and at least 0"),
        (lambda b: b.options.update(scale=float("nan")), ValueError, r"scale to be finite, got nan"),
        (lambda b: setattr(b, "layers", []), ValueError, r"weight and bias of one layer or more"),
        (lambda b: b.options.update(first_channels=[0, 0]), ValueError, r"first_channels to have 3 numbers.* got 2"),
        (
            lambda b: b.options.update(first_channels=[0, 8, 0]),
            ValueError,
            r"first_channels\[1\] to be at least 0 and below 8, got 8",
        ),
        (
            lambda b: (setattr(b, "outer", b.input), setattr(b, "fusion", None)),
            ValueError,
            r"outer to be None without a fusion, got a tensor",
        ),
        (
            lambda b: set_layer(b, 1, b.layers[0].weight),
            ValueError,
            r"layer 1.weight to have shape \[3, 8, 3, 3\]",
        ),
        (lambda b: set_layer(b, 2, bias=torch.zeros(4).double()), ValueError, r"layer 2.bias to have shape \[3\], got"),
        (
            lambda b: set_layer(b, 0, b.layers[0].weight.int()),
            TypeError,
            r"input to be torch.int32 like the convolution",
        ),
        (
            lambda b: setattr(b, "fusion", ConvWeights(torch.zeros(5, 14, 5, 5).double(), None)),
            ValueError,
            r"the kernel of the fusion to be 1x1 or 3x3, got shape",
        ),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=rf"residual_dense_block: expected .*({message})"):
        changed(change).run()


# Scalar functions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "dtype"), [("", torch.float64), ("_float", torch.float32)])
def test_scalar_functions(suffix, dtype):
    relu, gradient, residual = (
        getattr(_C.scalar, name + suffix) for name in ("leaky_relu", "leaky_relu_gradient", "residual_sum")
    )
    values = [0.0, -0.0, 1.5, -1.5, 1e30, -1e30, math.inf]
    for slope in (0.0, 0.2, 1.0):
        v = torch.tensor(values, dtype=dtype, requires_grad=True)
        expected = nn.functional.leaky_relu(v, slope)
        made = torch.tensor([relu(value, slope) for value in values], dtype=dtype)
        torch.testing.assert_close(made, expected, rtol=0, atol=0)
        expected.sum().backward()
        grads = [gradient(1.0, y, slope) for y in made.tolist()]  # from the sign of the output
        torch.testing.assert_close(torch.tensor(grads, dtype=dtype), v.grad, rtol=0, atol=0)
    assert relu(-math.inf, 0.0) == 0 and relu(-math.inf, 0.5) == -math.inf
    assert math.isnan(relu(math.nan, 0.0)) and math.isnan(relu(math.nan, 0.2))
    assert gradient(3.0, 0.0, 0.25) == 0.75 and gradient(3.0, 1e-30, 0.25) == 3.0
    assert residual(2.0, 0.25, 10.0) == 10.5

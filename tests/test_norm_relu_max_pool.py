# SPDX-License-Identifier: Apache-2.0
"""norm_relu_max_pool against the plain sequence: CPU, CUDA, and the CUDA code with emulated kernels."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdense import reference
from fastdense.ops import NormWeights, norm_relu_max_pool
from tests.cases.norm_relu_max_pool import ALL, Case, Stem
from tests.cases.random_block import (
    check,
    check_any_output_gradient,
    check_one_gradient,
    low_precision_errors,
    relative,
)
from tests.cases.simd import available_levels, simd_level
from tests.emulation.blocks import DEVICES, emulated_kernels, on_device

POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a test's tensors live."""
    with on_device(request.param, 0) as device:
        yield device


def square(dims: int, kernel: int, stride: int, padding: int, **rest: Any) -> Case:
    return Case(
        size=(9, 7, 6)[:dims], kernel=(kernel,) * dims, stride=(stride,) * dims, padding=(padding,) * dims, **rest
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("frozen", [(), ALL], ids=["batch", "given"])
@pytest.mark.parametrize("pool", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (1, 1, 0), (2, 3, 1), (5, 2, 2)], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_parity(device, dims, pool, frozen, channels_last):
    check(Stem(square(dims, *pool, frozen=frozen, channels_last=channels_last, device=device)))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(affine=False),
        Case(affine=False, frozen=ALL),
        Case(kernel=(1, 3), stride=(3, 1), padding=(0, 1)),
        Case(size=(5, 8, 11), kernel=(3, 2, 5), stride=(1, 2, 3), padding=(0, 1, 2)),
        Case(size=(3, 300), kernel=(1, 255), stride=(1, 7), padding=(0, 127)),
        Case(size=(30,), kernel=(2,), stride=(5,), padding=(1,)),  # leaves gaps
        Case(batch=1, channels=1, size=(1, 2), kernel=(1, 1), stride=(1, 1), padding=(0, 0)),
        Case(batch=2, channels=1, size=(1,), kernel=(3,), stride=(2,), padding=(1,)),
        Case(batch=4, channels=70, size=(13, 6)),
        Case(batch=7, channels=16, size=(9, 8)),  # whole vectors of channels, on a GPU
        Case(batch=7, channels=16, size=(8, 9), kernel=(2, 2), stride=(2, 2), padding=(0, 0)),
        Case(batch=1, channels=2, size=(150, 120)),  # several blocks of lines, on a CPU
        Case(batch=2, channels=1, size=(9001,), kernel=(3,), stride=(2,), padding=(1,)),
    ],
    ids=repr,
)
def test_parity_of_special_cases(device, case, channels_last):
    check(Stem(replace(case, channels_last=channels_last, device=device)))


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_the_emulated_kernels_are_what_runs(backwards):
    """And their results do not depend on the order of threads."""
    for channels_last in (False, True):
        stem = Stem(Case(dtype=torch.float32, channels_last=channels_last))
        results = []
        for order in (False, backwards):
            with emulated_kernels(order, 0, 8) as library:
                before = library.launches()
                out, statistics = stem.run()
                results.append((out, *statistics, *stem.gradients(out, torch.ones_like(out)).values()))
                assert library.launches() > before
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_agrees_with_torchs_modules(device, dims, mode):
    norm, pool = NORMS[dims](6).double().to(device), POOLS[dims](3, 2, 1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm(torch.randn(2, 6, *[4] * dims, dtype=torch.float64, device=device))
    norm.train(mode == "train")
    x = torch.randn(2, 6, *[8] * dims, dtype=torch.float64, device=device, requires_grad=True)
    given = (None, None) if mode == "train" else (norm.running_mean.clone(), norm.running_var.clone())
    weights = NormWeights(norm.weight, norm.bias, *given, norm.eps)
    leaves = [x] if mode == "frozen" else [x, norm.weight, norm.bias]
    for parameter in norm.parameters():
        parameter.requires_grad_(mode != "frozen")
    made, _ = norm_relu_max_pool(x, weights, [3] * dims, [2] * dims, [1] * dims)
    expected = pool(norm(x).relu())
    grad = torch.randn_like(expected)
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(made, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("frozen", [(), ALL], ids=["batch", "given"])
def test_gradcheck(device, frozen, channels_last):
    stem = Stem(Case(2, 2, (4, 3), frozen=frozen, channels_last=channels_last, device=device))
    assert torch.autograd.gradcheck(lambda *_: stem.run()[0], [stem.input, *stem.parameters])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_torch(device, dtype, channels_last):
    case = Case(batch=4, channels=24, size=(20, 18), dtype=dtype, channels_last=channels_last, device=device)
    ours, theirs = low_precision_errors(Stem, case)
    assert all(mine <= 2 * other + 1e-6 for mine, other in zip(ours, theirs, strict=True))
    assert sum(ours) <= 1.5 * sum(theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_instruction_sets_give_the_same_output(dtype):
    for channels_last in (False, True):
        stem = Stem(Case(channels=37, size=(19, 23), dtype=dtype, frozen=ALL, channels_last=channels_last))
        results = []
        for level in available_levels():
            with simd_level(level):
                out, _ = stem.run()
                results.append((out, *stem.gradients(out, torch.ones_like(out)).values()))
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_both_layouts_give_the_same_input_gradient(device):
    results = []
    for channels_last in (False, True):
        stem = Stem(Case(frozen=ALL, kernel=(3, 3), stride=(1, 1), channels_last=channels_last, device=device))
        out, _ = stem.run()
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
        results.append((out, stem.gradients(out, grad)["input"]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def winners(x: Tensor, kernel: int = 3, **bias: float) -> list[int]:
    norm = [torch.empty(0), torch.full((1,), bias.get("bias", 0.0)), torch.zeros(1), torch.ones(1)]
    made = torch.ops.fastdense.norm_relu_max_pool(x.view(1, 1, -1), norm, 0.0, [kernel], [kernel], [0], True, "")
    return made[1].flatten().tolist()


def test_who_wins():
    assert winners(torch.tensor([1.0, 2.0, 0.5])) == [1]
    assert winners(torch.tensor([2.0, 2.0, 1.0])) == [0]  # the first of equals
    assert winners(torch.tensor([-1.0, -2.0, 0.0])) == [255]  # nobody
    assert winners(torch.tensor([-1.0, -2.0, 0.0]), bias=1.5) == [2]
    assert winners(torch.tensor([math.inf, math.nan, math.nan])) == [2]  # the last NaN, as in torch
    assert winners(torch.tensor([math.nan, math.inf, 1.0])) == [0]
    assert winners(torch.tensor([-math.inf, math.inf, math.inf])) == [1]
    positions = torch.arange(255.0) + 1
    assert winners(positions, 255) == [254]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels_last", [False, True])
def test_values_that_are_not_finite(device, value, channels_last):
    stem = Stem(Case(frozen=ALL, channels_last=channels_last, device=device))
    with torch.no_grad():
        stem.input[1, 2, 3, 3] = stem.input[0, 1, 0, 0] = value
    out, _ = stem.run()
    expected, _ = stem.expected()
    grad = torch.ones_like(out)
    torch.testing.assert_close(out, expected, equal_nan=True)
    wanted = stem.gradients(expected, grad)
    torch.testing.assert_close(stem.gradients(out, grad)["input"], wanted["input"], equal_nan=True)


def test_equal_values_and_zeros_get_torchs_gradient(device):
    """Small integers: many ties, and many windows without a positive value."""
    for channels_last in (False, True):
        stem = Stem(Case(batch=4, size=(12, 12), affine=False, frozen=ALL, channels_last=channels_last, device=device))
        stem.weights = NormWeights(None, None, torch.zeros(5).double(), torch.ones(5).double(), 0.0)
        stem.weights = NormWeights(*(t if t is None else t.to(stem.input.device) for t in stem.weights[:4]), 0.0)
        with torch.no_grad():
            stem.input.mul_(1.2).round_().sub_(1)
        out, _ = stem.run()
        expected, _ = stem.expected()
        grad = stem.normal(*out.shape)
        assert torch.equal(out, expected)
        torch.testing.assert_close(stem.gradients(out, grad), stem.gradients(expected, grad))


def test_large_mean_keeps_the_variance(device):
    for channels_last in (False, True):
        stem = Stem(Case(dtype=torch.float32, batch=8, size=(32, 32), channels_last=channels_last, device=device))
        with torch.no_grad():
            stem.input.add_(1000)
        _, statistics = stem.run()
        exact = reference.batch_statistics(stem.input.double())[1]
        assert relative(statistics.var.double(), exact) < 1e-6


@pytest.mark.parametrize("part", ["input", "norm.weight", "norm.bias"])
@pytest.mark.parametrize("frozen", [(), ALL], ids=["batch", "given"])
def test_only_what_needs_a_gradient_gets_one(device, part, frozen):
    check_one_gradient(Stem(Case(frozen=frozen, device=device)), part)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradient_that_is_expanded_strided_or_reused(device, channels_last):
    check_any_output_gradient(Stem(Case(channels_last=channels_last, device=device)))


def test_kept_for_backward_is_the_input_and_a_byte_a_pooled_value(device):
    stem = Stem(Case(dtype=torch.float32, device=device))
    pooled = 3 * 5 * 5 * 4
    assert stem.saved_numbers() == pooled + 2 * 5  # numbers of any width: bytes of winners, two statistics
    with torch.no_grad():
        arguments = stem.input, [torch.empty(0)] * 4, 0.0, *stem.pool
        assert torch.ops.fastdense.norm_relu_max_pool(*arguments, False, "")[1].numel() == 0


def test_memory_format_and_strides(device):
    stem = Stem(Case(device=device))
    base = stem.normal(6, 10, 18, 14)
    view = base[::2, ::2, ::2, ::2]
    expected, _ = norm_relu_max_pool(view.contiguous(), stem.weights, *stem.pool)
    made, _ = norm_relu_max_pool(view, stem.weights, *stem.pool)
    assert torch.equal(made, expected)
    assert made.is_contiguous()
    last, _ = norm_relu_max_pool(view.to(memory_format=torch.channels_last), stem.weights, *stem.pool)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, expected)


def test_reruns_give_the_same_bits():
    for channels_last in (False, True):
        stem = Stem(Case(batch=5, channels=13, size=(41, 37), dtype=torch.float32, channels_last=channels_last))
        results = []
        for _ in range(3):
            out, statistics = stem.run()
            results.append((out, *statistics, *stem.gradients(out, torch.ones_like(out)).values()))
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("frozen", [(), ALL], ids=["batch", "given"])
def test_empty_batch(device, frozen):
    stem = Stem(Case(batch=0, frozen=frozen, device=device))
    out, statistics = stem.run()
    assert out.shape == (0, 5, 5, 4)
    assert not torch.cat(statistics).any()
    assert all(not g.any() for g in stem.gradients(out, torch.zeros_like(out)).values())


def test_double_backward_raises(device):
    stem = Stem(Case(device=device))
    (grad,) = torch.autograd.grad(stem.run()[0].square().sum(), stem.input, create_graph=True)
    with pytest.raises(RuntimeError, match="norm_relu_max_pool: double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_gives_torchs_type(dims, dtype):
    norm, pool = NORMS[dims](3), POOLS[dims](3, 2, 1)
    norm = norm.double() if dtype == torch.float64 else norm
    x = torch.randn(2, 3, *[6] * dims).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        weights = NormWeights(norm.weight, norm.bias, None, None, norm.eps)
        made, _ = norm_relu_max_pool(x, weights, [3] * dims, [2] * dims, [1] * dims)
        expected = pool(norm(x).relu())
    assert made.dtype == expected.dtype
    torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_compiles_with_a_changing_batch(channels_last):
    run = torch.compile(lambda *a: norm_relu_max_pool(*a)[0], fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        stem = Stem(Case(batch=batch, channels_last=channels_last))
        out = run(stem.input, stem.weights, *stem.pool)
        expected, _ = stem.expected()
        torch.testing.assert_close(out, expected)
        grad = torch.ones_like(out)
        torch.testing.assert_close(stem.gradients(out, grad), stem.gradients(expected, grad))


@pytest.mark.gpu
def test_cuda_graph():
    stem = Stem(Case(device="cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        made, _ = stem.run()
    with torch.no_grad():
        stem.input.mul_(2)
    graph.replay()
    torch.testing.assert_close(made, stem.expected()[0])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"input": torch.zeros(2, 5)}, ValueError, r"input to have 3 to 5 dimensions, got shape \[2, 5\]"),
        ({"input": torch.zeros(2, 5, 9, 7).int()}, TypeError, "input to be float32, float64, float16 or bfloat16"),
        ({"input": torch.zeros(2, 4, 9, 7)}, ValueError, r"norm.weight to have shape \[4\], got \[5\]"),
        ({"input": torch.zeros(2, 5, 9, 0)}, ValueError, "every spatial size to be at least 1, got 0"),
        ({"input": torch.zeros(2, 5, 9, 0), "padding": (1, 1)}, ValueError, "every spatial size to be at least 1"),
        ({"kernel_size": (3,)}, ValueError, r"kernel_size to have 2 entries, got \[3\]"),
        ({"kernel_size": (3, 0)}, ValueError, "kernel_size to be at least 1, got 0"),
        ({"kernel_size": (16, 16)}, ValueError, r"kernel_size to have at most 255 positions, got \[16, 16\]"),
        ({"kernel_size": (2**40, 1)}, ValueError, "kernel_size to be at most 255, got"),
        ({"kernel_size": (12, 1)}, ValueError, "padded spatial size to be at least 12, got 11"),
        ({"stride": (2, 0)}, ValueError, "stride to be at least 1, got 0"),
        ({"padding": (1, 2)}, ValueError, "padding to be at most 1, got 2"),
        ({"padding": (-1, 1)}, ValueError, "padding to be at least 0, got -1"),
    ],
)  # fmt: skip
def test_errors(changed, error, message):
    stem = Stem(Case(size=(9, 7), dtype=torch.float32))
    arguments = dict(zip(("kernel_size", "stride", "padding"), stem.pool, strict=True))
    arguments |= {"input": stem.input, "norm": stem.weights} | changed
    if "16, 16" in message:
        arguments["input"] = torch.zeros(2, 5, 20, 20)
    with pytest.raises(error, match=f"^norm_relu_max_pool: expected {message}"):
        norm_relu_max_pool(**arguments)


def test_one_value_a_channel_is_refused_in_training_only():
    one = dict(size=(1, 1), kernel=(1, 1), stride=(1, 1), padding=(0, 0), batch=1)
    with pytest.raises(ValueError, match="more than 1 value per channel when training, got shape"):
        Stem(Case(**one)).run()
    check(Stem(Case(**one, frozen=ALL)))


def test_wrong_gradients_are_refused():
    stem = Stem(Case())
    norm = [t.detach() for t in stem.weights[:2]] + [torch.empty(0)] * 2
    run = torch.ops.fastdense.norm_relu_max_pool(stem.input.detach(), norm, 1e-3, *stem.pool, True, "")

    def backward(grad: Tensor, winners: Tensor) -> None:
        arguments = grad, stem.input.detach(), winners, *run[2:], norm, 1e-3, *stem.pool, [True] * 5, ""
        torch.ops.fastdense._norm_relu_max_pool_backward(*arguments)

    for grad, kept, error, message in (
        (run[0][1:], run[1], ValueError, "grad_output to have shape"),
        (run[0].float(), run[1], TypeError, "grad_output to be float64 like input"),
        (run[0], run[1][:0], ValueError, "winners to have shape"),
        (run[0], run[1].int(), TypeError, "winners to be uint8, got int32"),
    ):
        with pytest.raises(error, match=f"^_norm_relu_max_pool_backward: expected {message}"):
            backward(grad, kept)

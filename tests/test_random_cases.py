# SPDX-License-Identifier: Apache-2.0
"""Operators on random shapes, strides, types and options, each against the reference; ``make fuzz`` tries many more."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fastdense import bicubic_resize, reference
from fastdense.ops import highway_gate, mean_join
from fastdense.ops.bicubic import PRESETS
from fastdense.ops.dense_block import MEMORY_MODES
from fastdense.ops.dual_path import DUAL_PATH_MEMORY_MODES
from fastdense.ops.highway_gate import ACTIVATIONS
from tests.cases import bicubic, dual_path
from tests.cases import dense_block as dense
from tests.cases import highway_gate as highway
from tests.cases import residual_dense_block as residual
from tests.cases.random_block import RandomBlock, low_precision_errors
from tests.cases.simd import available_levels, simd_level

LARGEST = {1: 40, 2: 12, 3: 5}  # spatial size by number of dimensions
MEMORY_LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels innermost": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "batch innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "rows innermost": lambda x: x.transpose(2, -1).contiguous().transpose(2, -1),
    "every second number": lambda x: torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0],
    "last channels of more": lambda x: torch.cat([torch.full_like(x, math.nan), x], 1)[:, x.shape[1] :],
}
LAYOUTS = MEMORY_LAYOUTS | {
    "one image for all": lambda x: x[:1].expand_as(x),
    "one pixel for all": lambda x: x[..., :1].expand_as(x),
}
layouts = st.sampled_from(list(LAYOUTS))
memory_layouts = st.sampled_from(list(MEMORY_LAYOUTS))
levels = st.sampled_from(available_levels())
threads = st.integers(1, 3)
eps = {dtype: torch.finfo(dtype).eps for dtype in highway.DTYPES}


def sizes(least: int = 1) -> st.SearchStrategy[tuple[int, ...]]:
    return st.integers(1, 3).flatmap(lambda dims: st.tuples(*[st.integers(least, LARGEST[dims])] * dims))


@contextlib.contextmanager
def machine(count: int, level: str) -> Iterator[None]:
    """That many threads and that SIMD level."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with simd_level(level):
            yield
    finally:
        torch.set_num_threads(before)


def leaf(x: Tensor, layout: str) -> Tensor:
    return LAYOUTS[layout](x.detach()).requires_grad_()


def assert_near(made: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, share: float = 1e-3) -> None:
    """Relative to each tensor, or to a share of the largest: a gradient that vanishes is rounding alone."""
    expected = [t.detach() for t in expected]
    floor = share * max(float(t.double().norm()) for t in expected)
    for index, (ours, wanted) in enumerate(zip(made, expected, strict=True)):
        assert ours.shape == wanted.shape
        error = float((ours.detach().double() - wanted.double()).norm())
        assert error <= tolerance * max(float(wanted.double().norm()), floor), (index, error)


def results(block: RandomBlock, run: Any, grad: Tensor) -> list[Tensor]:
    out, _ = run
    return [out, *block.gradients(out, grad).values()]


def check_block(block: RandomBlock, layout: str, modes: Sequence[str], on: tuple[int, str]) -> None:
    """The first memory mode against the reference; the others give the same bits."""
    # A channel of equal values is 0 up to rounding behind its norm, which then decides what ReLU does but for a bias.
    assume(block.case.affine or layout in MEMORY_LAYOUTS)
    block.input = leaf(block.input, layout)
    expected, statistics = block.expected()
    grad = leaf(block.normal(*expected.shape), layout).detach()
    wanted = results(block, (expected, None), grad)
    with machine(*on):
        made = [results(block, block.run(mode), grad) for mode in modes]
        _, own_statistics = block.run()
    # Behind its norm such a channel is rounding, enlarged by 1 / sqrt(eps), and so are its gradients.
    share = 1e-3 if layout in MEMORY_LAYOUTS else 1.0
    assert_near(made[0], wanted, 1e-8, share)
    if not block.case.frozen and own_statistics.var.any():  # none are taken where no norm asks for them
        assert_near(own_statistics, statistics, 1e-10)
    if "reversible" not in modes:
        assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))
    else:
        assert_near(made[1], wanted, 1e-8, share)


@st.composite
def dense_cases(draw: Any) -> dense.Case:
    tail = draw(st.sampled_from(["none", "transition", "norm", "norm_relu"]))
    layers = draw(st.integers(0, 3))
    case = dense.Case(
        batch=draw(st.integers(1, 4)),
        in_channels=draw(st.integers(1, 40)),
        growth_rate=draw(st.integers(1, 19)),
        num_layers=layers,
        width=draw(st.sampled_from([0, 1, 5, 16, 33])),
        size=draw(sizes(2 if tail == "transition" else 1)),
        tail=tail,
        frozen=draw(st.sampled_from([(), ("norm1",), ("norm2", "tail"), ("0.norm",), dense.ALL])),
        affine=draw(st.booleans()),
        drop_rate=draw(st.sampled_from([0.0, 0.0, 0.3])),
        active=draw(st.none() | st.tuples(*[st.booleans()] * layers)),
    )
    assume(case.frozen == dense.ALL or case.batch * math.prod(case.size) > 1)
    return case


@given(dense_cases(), layouts, threads, levels)
def test_dense_block(case, layout, count, level):
    check_block(dense.Block(case), layout, MEMORY_MODES, (count, level))


@st.composite
def dual_path_cases(draw: Any) -> dual_path.StageCase:
    groups = draw(st.integers(1, 3))
    projection = draw(st.booleans())
    case = dual_path.StageCase(
        num_blocks=draw(st.integers(1, 3)),
        residual_channels=draw(st.integers(0, 9)),
        growth_rate=draw(st.integers(0, 9)),
        first_dense=draw(st.integers(0, 9)),
        in_channels=draw(st.integers(1, 20)),
        width=groups * draw(st.integers(1, 6)),
        width_behind=groups * draw(st.integers(1, 6)),
        groups=groups,
        projection=projection,
        stride=draw(st.integers(1, 2)) if projection else 1,
        batch=draw(st.integers(1, 4)),
        size=draw(sizes()),
        frozen=draw(st.sampled_from([(), ("norm_a",), ("norm_b", "norm_c"), ("projection",)])),
        affine=draw(st.booleans()),
    )
    assume(case.residual_channels + min(case.first_dense, case.growth_rate) > 0)
    assume(case.batch * math.prod(-(-size // case.stride) for size in case.size) > 1)
    return case


@given(dual_path_cases(), layouts, threads, levels, st.sampled_from(DUAL_PATH_MEMORY_MODES[1:]))
def test_dual_path_stage(case, layout, count, level, mode):
    check_block(dual_path.Stage(case), layout, ["balanced", mode], (count, level))


def check_low_precision(make: Callable[[Any], RandomBlock], case: Any, layout: str, on: tuple[int, str]) -> None:
    """The output is about as near to float64's as that of torch's operators; gradients are there and finite.

    With few values a channel, batch norm makes what it likes of a rounded one.
    """
    case = replace(case, batch=max(case.batch, -(-16 // math.prod(case.size))))

    def laid_out(case: Any) -> RandomBlock:
        block = make(case)
        block.input = leaf(block.input, layout)
        return block

    with machine(*on):
        ours, theirs = low_precision_errors(laid_out, case)
    assert ours[0] <= 4 * theirs[0] + 16 * eps[case.dtype]
    assert all(math.isfinite(error) for error in ours) or not all(math.isfinite(error) for error in theirs)


@given(dense_cases(), st.sampled_from(highway.DTYPES[1:]), memory_layouts, threads, levels)
def test_dense_block_in_low_precision(case, dtype, layout, count, level):
    if case.tail == "transition" and len(case.size) == 3:
        case = replace(case, tail="norm")  # torch cannot pool volumes of 16 bits
    check_low_precision(dense.Block, replace(case, dtype=dtype), layout, (count, level))


@given(dual_path_cases(), st.sampled_from(highway.DTYPES[1:]), memory_layouts, threads, levels)
def test_dual_path_stage_in_low_precision(case, dtype, layout, count, level):
    # On images of one pixel torch's bfloat16 convolution leaves weight gradients unwritten at stride 2, and with groups
    # it is wrong on some volumes of size (1, n, 1).
    case = replace(case, size=tuple(max(3, size) for size in case.size))
    check_low_precision(dual_path.Stage, replace(case, dtype=dtype), layout, (count, level))


residual_cases = st.builds(
    residual.Case,
    channels=st.integers(1, 40),
    growth=st.integers(1, 40),
    layers=st.integers(1, 3),
    kernel=st.sampled_from([1, 3]),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    slope=st.sampled_from([0.0, 0.2, 1.0]),
    outer=st.booleans(),
    bias=st.booleans(),
    batch=st.integers(1, 3),
    fusion=st.just(True),
    first=st.none(),
)
residual_cases |= residual_cases.map(  # the blocks of SRDenseNet
    lambda case: case._replace(fusion=False, outer=False, first=(0, *[case.channels] * (case.layers - 1)))
)


@given(residual_cases, layouts, st.sampled_from([torch.float64, torch.float32]), threads, levels)
def test_residual_dense_block(case, layout, dtype, count, level):
    torch.manual_seed(0)
    block = residual.Block(case, dtype)
    block.input = leaf(block.input, layout)
    wanted = residual.results(block, reference.residual_dense_block)
    with machine(count, level):
        made = residual.results(block)
    assert_near(made, wanted, 1e3 * eps[dtype], share=0.1)


@given(
    st.sampled_from(list(PRESETS)),
    st.integers(1, 3).flatmap(lambda dims: st.tuples(*[st.tuples(*[st.integers(1, 90 // 3**dims)] * 2)] * dims)),
    st.integers(1, 3),
    st.integers(1, 20),
    layouts,
    threads,
    levels,
)
def test_bicubic_resize(preset, axes, batch, channels, layout, count, level):
    old, new = zip(*axes, strict=True)
    x = leaf(bicubic.random(batch, channels, *old), layout)
    expected = bicubic.expected(x, new, preset)
    grad = leaf(bicubic.random(*expected.shape), layout).detach()
    with machine(count, level):
        out = bicubic_resize(x, new, preset=preset)
        made = [out, *torch.autograd.grad(out, x, grad)]
    assert_near(made, [expected, *torch.autograd.grad(expected, x, grad)], 1e-11)


@given(st.data(), sizes(), st.sampled_from(ACTIVATIONS), st.sampled_from(highway.DTYPES), threads, levels)
def test_highway_gate(data, size, activation, dtype, count, level):
    batch, channels = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20))
    x = leaf(bicubic.random(batch, channels, *size, dtype=dtype), data.draw(layouts))
    projection = leaf(bicubic.random(batch, 2 * channels, *size, dtype=dtype), data.draw(layouts))
    exact = [t.detach().double().requires_grad_() for t in (x, projection)]
    expected = highway.reference(*exact, activation)
    grad = bicubic.random(*x.shape, dtype=dtype)
    with machine(count, level):
        out = highway_gate(x, projection, activation)
        made = [out, *torch.autograd.grad(out, (x, projection), grad)]
    assert {t.dtype for t in made} == {dtype}
    assert_near(made, [expected, *torch.autograd.grad(expected, exact, grad.double())], 16 * eps[dtype], share=0.1)


@given(st.data(), sizes(), st.integers(1, 16), st.sampled_from(highway.DTYPES), threads, levels)
def test_mean_join(data, size, joined, dtype, count, level):
    shape = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20)), *size)
    torch.manual_seed(0)
    inputs = [leaf(torch.randn(shape).to(dtype), data.draw(layouts)) for _ in range(joined)]
    with machine(count, level):
        out = mean_join(inputs)
        made = [out, *torch.autograd.grad(out, inputs, inputs[0].detach())]
    expected = reference.mean_join([x.detach().double() for x in inputs])
    assert_near(made, [expected, *[inputs[0].detach().double() / joined] * joined], 4 * eps[dtype])

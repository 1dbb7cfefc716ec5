# SPDX-License-Identifier: Apache-2.0
"""Dense blocks in inference against the reference: folded norms, F(4x4, 3x3), images shared out among threads."""

import itertools

import pytest
import torch

from fastdense.ops.dense_block import flatten_block
from fastdense.ops.dense_block_inference import pack_block, run_inference
from tests.cases.dense_block import ALL, Block, Case
from tests.cases.simd import LEVELS, available_levels, has_level, simd_level

TAILS = ("none", "transition", "norm", "norm_relu")


def flat_of(block):
    return flatten_block(block.layers, block.tail)


def both(case: Case, threads: int = 1):
    """The operator's output by packed weights and by those that it packs itself, and the reference's."""
    block = Block(case)
    flat = flat_of(block)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            packed = pack_block(flat, case.in_channels)
            out = run_inference(block.input, flat, packed)
            assert torch.equal(out, run_inference(block.input, flat))
            return out, block.expected()[0]
    finally:
        torch.set_num_threads(before)


def relative(a, b) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


SIZES = ((7,), (1, 1), (2, 3), (4, 4), (5, 9), (8, 12), (13, 6), (3, 4, 5))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("width", [0, 20])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float64(size, width, tail):
    if tail == "transition" and min(size) < 2:
        size = tuple(max(2, s) for s in size)
    out, expected = both(Case(batch=2, size=size, width=width, tail=tail, frozen=ALL))
    assert out.shape == expected.shape and relative(out, expected) <= 1e-12


@pytest.mark.parametrize("batch, threads", list(itertools.product([1, 2, 3, 5, 16, 17], [1, 2, 3])))
def test_any_batch_on_any_number_of_threads(batch, threads):
    for width, size in ((20, (9, 10)), (0, (5, 4, 3)), (20, (30,))):
        out, expected = both(Case(batch=batch, size=size, width=width, tail="transition", frozen=ALL), threads)
        assert relative(out, expected) <= 1e-12


def test_large_images_are_worked_on_in_parts():
    case = Case(batch=2, size=(61, 58), width=40, num_layers=2, tail="transition", frozen=ALL)
    for threads in (1, 2, 3):
        out, expected = both(case, threads)
        assert relative(out, expected) <= 1e-12


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 2), (3, 3), (4, 4), (5, 5), (6, 5), (6, 6), (7, 7)], ids=str)
def test_images_so_small_that_taps_are_added_up(size, level):
    """One image, or a few that go together, on both sides of where F(4x4, 3x3) begins."""
    if not has_level(level):
        return
    with simd_level(level):
        for batch, threads, width in itertools.product([1, 2, 4, 9], [1, 2], [0, 20]):
            tail = "transition" if min(size) > 1 else "norm"
            out, expected = both(Case(batch=batch, size=size, width=width, tail=tail, frozen=ALL), threads)
            assert relative(out, expected) <= 1e-12


@pytest.mark.parametrize("growth, width", [(1, 3), (16, 64), (17, 65), (33, 130)])
def test_channels_that_fill_panels_or_do_not(growth, width):
    out, expected = both(Case(growth_rate=growth, width=width, tail="norm", frozen=ALL))
    assert relative(out, expected) <= 1e-12


@pytest.mark.parametrize("level", LEVELS)
def test_every_simd_level_of_this_machine(level):
    if not has_level(level):
        return
    with simd_level(level):
        for size, dtype in itertools.product(((9, 11), (4, 5, 6)), (torch.float64, torch.float32)):
            out, expected = both(Case(size=size, tail="transition", frozen=ALL, dtype=dtype))
            assert relative(out, expected) <= (1e-12 if dtype == torch.float64 else 2e-5)


def test_weights_packed_for_other_instructions_are_refused():
    block = Block(Case(frozen=ALL))
    flat = flat_of(block)
    levels = available_levels()
    with torch.no_grad():
        with simd_level(levels[0]):
            packed = pack_block(flat, 10)
        if len(levels) > 1:
            message = f"packed to be made for {levels[-1]}, got instruction set"
            with simd_level(levels[-1]), pytest.raises(ValueError, match=message):
                run_inference(block.input, flat, packed)
        packed.tensors[0] = packed.tensors[0] + 17
        with pytest.raises(ValueError, match="packed to be made for"):
            run_inference(block.input, flat, packed)


@pytest.mark.parametrize("at", [1, 2])
def test_packed_weights_that_do_not_fit_are_refused(at):
    block = Block(Case(frozen=ALL, num_layers=1, tail="norm"))
    flat = flat_of(block)
    with torch.no_grad():
        packed = pack_block(flat, 10)
        tensors = packed.tensors
        for wrong in (tensors[at][:-1], tensors[at].to(torch.int16)):
            with pytest.raises((ValueError, TypeError), match="dense_block_inference: expected packed"):
                run_inference(block.input, flat, packed._replace(tensors=[*tensors[:at], wrong, *tensors[at + 1 :]]))
        with pytest.raises(ValueError, match="expected packed to have 3 entries, got 2"):
            run_inference(block.input, flat, packed._replace(tensors=tensors[:-1]))


def test_what_is_no_inference_is_refused():
    for case, message in (
        (Case(), "running statistics for every norm"),
        (Case(frozen=ALL, bias=True), "those of norms and convolutions, got more"),
    ):
        block = Block(case)
        flat = flat_of(block)
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            pack_block(flat, 10)
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            run_inference(block.input, flat)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(9, 10), (4, 5, 3)], ids=str)
def test_16_bits_err_as_torch_does(dtype, size):
    case = Case(batch=4, in_channels=32, width=64, growth_rate=16, size=size, tail="transition", frozen=ALL)
    exact = Block(case)
    rounded = Block(case)
    for block in (exact, rounded):
        block.input = block.input.detach().to(dtype).double()
    flat = flat_of(rounded)
    weights = [None if w is None else w.detach().to(dtype) for w in flat.weights]
    doubles = [None if w is None else w.double() for w in weights]
    with torch.no_grad():
        wanted = run_inference(exact.input, flat._replace(weights=doubles))
        half = flat._replace(weights=weights, conv_dtypes=[dtype])
        out = run_inference(exact.input.to(dtype), half)
    # The slices are stored in 16 bits: a few of their units in the last place.
    assert relative(out, wanted) <= 4 * torch.finfo(dtype).eps


# Channels, growth and size of 3x3 convolutions of DenseNets.
@pytest.mark.parametrize(
    "channels, growth, size", [(128, 32, 56), (128, 32, 28), (192, 48, 14), (128, 32, 7), (60, 12, 32)]
)
def test_float32_errs_at_most_three_times_as_much_as_torch(channels, growth, size):
    """F(4x4, 3x3) rounds more than a sum over taps; seen through a layer of one 3x3 convolution."""
    torch.manual_seed(0)
    case = Case(4, channels, growth, 1, 0, (size, size), frozen=ALL, dtype=torch.float64)
    block = Block(case)
    x = torch.randn(case.batch, channels, size, size)
    flat = flat_of(block)
    single = [None if w is None else w.detach().float() for w in flat.weights]
    with torch.no_grad():
        doubles = flat._replace(weights=[None if w is None else w.double() for w in single])
        wanted = run_inference(x.double(), doubles)[:, channels:]
        out = run_inference(x, flat._replace(weights=single, conv_dtypes=[torch.float32]))[:, channels:]
        weight, bias, mean, var, conv = single
        activated = torch.relu(torch.batch_norm(x, weight, bias, mean, var, False, 0.0, flat.eps[0], False))
        plain = torch.conv2d(activated, conv, padding=1)
    errors = [(y.double() - wanted).abs() for y in (out, plain)]
    assert errors[0].square().mean().sqrt() <= 3 * errors[1].square().mean().sqrt()
    assert errors[0].max() <= 3 * errors[1].max()


def test_reruns_are_bit_identical():
    for threads, batch in ((1, 3), (2, 1), (2, 4)):
        case = Case(batch=batch, size=(15, 14), tail="transition", frozen=ALL, dtype=torch.float32)
        assert torch.equal(both(case, threads)[0], both(case, threads)[0])


def test_any_strides_and_layouts():
    block = Block(Case(batch=2, size=(6, 9), frozen=ALL, tail="norm"))
    flat = flat_of(block)
    with torch.no_grad():
        expected = run_inference(block.input, flat)
        for x in (
            block.input.to(memory_format=torch.channels_last),
            block.input.transpose(2, 3).contiguous().transpose(2, 3),
            torch.stack([block.input, block.input], -1)[..., 0],
        ):
            assert torch.equal(run_inference(x, flat), expected)
        assert run_inference(block.input, flat, contiguous=True).is_contiguous()
        assert expected.is_contiguous(memory_format=torch.channels_last)

# SPDX-License-Identifier: Apache-2.0
"""The dense block operator against the concatenating reference: CPU, CUDA, and the CUDA code with emulated kernels."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastdense import reference
from fastdense.ops import Activation, LayerWeights, dense_block, update_running_stats_
from tests.cases.dense_block import ACTIVATIONS, ALL, EMULATED_SCRATCH, Block, Case
from tests.cases.random_block import (
    check,
    check_any_output_gradient,
    check_bit_identical,
    check_one_gradient,
    low_precision_errors,
    relative,
)
from tests.cases.simd import LEVELS, has_level, simd_level
from tests.emulation.blocks import DEVICES, emulated_kernels, on_device


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a test's tensors live."""
    with on_device(request.param, EMULATED_SCRATCH) as device:
        yield device


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_the_emulated_kernels_are_what_runs(backwards):
    """And their results do not depend on the order of threads."""
    block = Block(Case(dtype=torch.float32, tail="transition", memory="min"))
    results = []
    for order in (False, backwards):
        with emulated_kernels(order, EMULATED_SCRATCH, 8) as library:
            before = library.launches()
            out, _ = block.run()
            results.append({"out": out} | block.gradients(out, torch.ones_like(out)))
            assert library.launches() > before
    assert all(torch.equal(results[1][name], value) for name, value in results[0].items())


@pytest.mark.parametrize("memory", ["balanced", "min"])
@pytest.mark.parametrize("tail", ["none", "transition", "norm", "norm_relu"])
@pytest.mark.parametrize("width", [20, 0], ids=["bottleneck", "plain"])
@pytest.mark.parametrize("size", [(9,), (7, 5), (5, 4, 3)], ids=["1d", "2d", "3d"])
def test_parity(device, size, width, tail, memory):
    check(Block(Case(size=size, width=width, tail=tail, memory=memory, device=device)))


@pytest.mark.parametrize(
    "case",
    [
        Case(frozen=ALL, tail="transition"),
        Case(frozen=("norm1",), tail="transition"),
        Case(frozen=("norm2",), tail="norm"),
        Case(frozen=("1.norm1", "tail"), tail="norm_relu", memory="min"),
        Case(frozen=ALL, width=0, tail="none"),
        Case(affine=False, tail="transition"),
        Case(drop_rate=0.3, tail="transition"),
        Case(drop_rate=0.3, tail="transition", memory="min"),
        Case(drop_rate=0.3, tail="transition", memory="recompute"),
        Case(frozen=("1.norm1", "0.norm2", "tail"), tail="norm_relu", memory="recompute"),
        Case(width=0, size=(4, 3, 2), memory="recompute"),
        Case(active=(True, False, True), size=(7,), memory="recompute"),
        Case(drop_rate=1.0, tail="none", frozen=ALL),
        Case(active=(True, False, True), tail="transition"),
        Case(active=(False, True, True), tail="norm", memory="min"),
        Case(active=(True, True, False), width=0, size=(5, 4, 3), drop_rate=0.3),
        Case(active=(False, False, True, False, True), num_layers=5, tail="transition"),
        Case(active=(False, True, False), frozen=ALL, tail="norm_relu"),
        Case(active=(False, False, False), tail="transition"),
        Case(active=(True, False, True), width=0, size=(9,), tail="norm_relu"),
        Case(num_layers=0, tail="transition"),
        Case(num_layers=0, tail="norm_relu"),
        Case(batch=1, size=(1, 2), num_layers=1),
        Case(batch=1, size=(13, 11), tail="transition"),
        Case(batch=2, in_channels=2, growth_rate=1, width=3, size=(17, 1)),
        Case(batch=2, in_channels=300, growth_rate=12, width=48, num_layers=2, size=(6, 6), tail="norm"),
        Case(batch=5, in_channels=24, growth_rate=32, width=128, num_layers=2, size=(31, 30), tail="transition"),
        Case(batch=2, in_channels=24, growth_rate=32, width=128, num_layers=1, size=(9, 301)),
        Case(batch=2, in_channels=5, growth_rate=40, width=0, num_layers=2, size=(53, 1)),
        Case(batch=2, in_channels=5, growth_rate=32, width=16, num_layers=2, size=(3, 4, 1)),
    ],
    ids=repr,
)
def test_parity_of_special_cases(device, case):
    check(Block(replace(case, device=device)))


@pytest.mark.parametrize("level", LEVELS)
def test_every_simd_level_of_this_machine(level):
    if not has_level(level):
        return
    with simd_level(level):
        check(Block(Case(in_channels=37, growth_rate=5, width=19, tail="transition", size=(9, 8))))
        check(Block(Case(dtype=torch.float32, in_channels=37, width=19, tail="transition")), tolerance=2e-5)
        for act in ACTIVATIONS:
            check(Block(Case(in_channels=37, growth_rate=5, width=19, tail="transition", acts=(act,), bias=True)))
        # Sizes that fill no tile. A flipped ReLU weighs a lot in so small a block, hence the sum and the factor.
        for dtype in (torch.bfloat16, torch.float16):
            for case in (
                Case(dtype=dtype, in_channels=37, growth_rate=5, width=19, tail="transition"),
                Case(dtype=dtype, batch=2, in_channels=70, width=48, size=(17, 9), tail="norm_relu"),
                Case(dtype=dtype, growth_rate=33, width=0, num_layers=2, size=(9, 9), tail="transition"),
            ):
                ours, theirs = low_precision_errors(Block, case)
                assert sum(ours) < 4 * sum(theirs)


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 3, 2, 2, 4, (3, 4), "transition"),
        Case(2, 3, 2, 2, 4, (4, 3), "norm_relu", frozen=ALL),
        Case(2, 3, 2, 2, 0, (5,), "none", memory="min", drop_rate=0.4),
        Case(2, 3, 2, 3, 4, (3, 2), "transition", active=(True, False, True)),
    ],
    ids=repr,
)
def test_gradcheck_of_a_whole_block(device, case):
    block = Block(replace(case, device=device))

    def run(*_):
        return block.run()[0]

    assert torch.autograd.gradcheck(run, [block.input, *block.parameters], fast_mode=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_torch(device, dtype):
    shape = Case(batch=4, in_channels=24, growth_rate=12, width=48, num_layers=4, size=(12, 12), tail="transition")
    ours, theirs = low_precision_errors(Block, replace(shape, dtype=dtype, device=device))
    # A factor of 2: the order of torch's own sums depends on the processor.
    assert all(mine <= 2 * other + 1e-6 for mine, other in zip(ours, theirs, strict=True))
    assert sum(ours) <= 1.5 * sum(theirs)


@pytest.mark.parametrize("threads", [1, 2])
def test_float_sums_over_many_pixels_are_as_good_as_those_of_torch(threads):
    """However few threads share them: with one, all pixels go through the same sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = Case(batch=8, width=16, num_layers=2, size=(32, 32), tail="transition", dtype=torch.float32)
        ours, theirs = low_precision_errors(Block, case)
    finally:
        torch.set_num_threads(before)
    assert sum(ours) <= sum(theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dropout_in_low_precision(device, dtype):
    """New features of 16 bytes, whose mask takes two random blocks; single gradients differ by flipped ReLUs."""
    shape = Case(batch=4, in_channels=24, growth_rate=8, width=48, num_layers=4, size=(12, 12), drop_rate=0.3)
    ours, theirs = low_precision_errors(Block, replace(shape, dtype=dtype, device=device))
    assert sum(ours) <= 1.5 * sum(theirs)


@pytest.mark.parametrize("active", [None, (False, True, True)])
def test_memory_modes_are_bit_identical(device, active):
    case = Case(dtype=torch.float32, tail="transition", size=(24, 24), drop_rate=0.2, active=active, device=device)
    block = Block(case)
    check_bit_identical(block, ["balanced", "min", "recompute", "balanced"])


def test_saved_bytes_match_the_closed_form(device):
    for memory, per_pixel in (("balanced", 28 + 3 * 20), ("min", 28), ("recompute", 0)):  # but its input
        block = Block(Case(dtype=torch.float32, memory=memory, device=device))
        statistics = 2 * (28 + 3 * 20)
        pixels = 3 * 7 * 5
        assert block.saved_numbers() == pixels * per_pixel + statistics + 1  # the seed


def test_a_layer_that_is_not_active_leaves_zeros_and_nothing_else(device):
    active = (True, False, True)
    for memory, per_pixel in (("balanced", 28 + 2 * 20), ("min", 28), ("recompute", 0)):  # but its input
        block = Block(Case(dtype=torch.float32, memory=memory, active=active, device=device))
        assert block.saved_numbers() == 3 * 7 * 5 * per_pixel + 2 * (28 + 3 * 20) + 1  # the seed
    out, statistics = block.run()
    assert not out[:, 16:22].any()
    assert all(out[:, at : at + 6].any() for at in (10, 22))
    for values in statistics:
        assert not values[16:22].any()
        assert not values[28 + 20 : 28 + 40].any()
    kept = {t.data_ptr() for t in block.parameters[6:12]}  # of layer 1
    assert len(kept) == 6
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.discard(t.data_ptr()) or t, lambda t: t):
        block.run()
    assert len(kept) == 6


@pytest.mark.parametrize("part", ["input", "0.conv2", "2.norm1.weight", "1.conv1", "tail.conv", "tail.norm.bias"])
def test_only_what_needs_a_gradient_gets_one(device, part):
    check_one_gradient(Block(Case(tail="transition", device=device)), part)


def test_gradient_that_is_expanded_strided_or_reused(device):
    check_any_output_gradient(Block(Case(tail="none", device=device)))


def test_non_finite_values_propagate_as_in_torch(device):
    for value in (float("nan"), float("inf")):
        block = Block(Case(tail="norm_relu", frozen=ALL, device=device))
        with torch.no_grad():
            block.input[1, 2, 3, 3] = value
        out, _ = block.run()
        expected, _ = block.expected()
        assert torch.equal(out.isfinite(), expected.isfinite())
        assert out.isnan().any()


def test_in_place_edit_of_the_output_raises_in_backward(device):
    out, _ = Block(Case(device=device)).run()
    out.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_double_backward_raises(device):
    block = Block(Case(device=device))
    out, _ = block.run()
    (grad,) = torch.autograd.grad(out.square().sum(), block.input, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_large_mean_keeps_the_variance(device):
    block = Block(Case(dtype=torch.float32, batch=8, size=(32, 32), num_layers=1, device=device))
    with torch.no_grad():
        block.input.add_(1000)
    _, statistics = block.run()
    exact = reference.batch_statistics(block.input.double())[1]
    assert relative(statistics.var[:10].double(), exact) < 1e-6


def test_inputs_of_any_strides(device):
    block = Block(Case(device=device))
    base = block.normal(6, 20, 14, 10)
    expected = None
    for view in (base[::2, :10, ::2, ::2], base[::2, :10, ::2, ::2].contiguous()):
        out, _ = dense_block(view, block.layers)
        expected = out if expected is None else expected
        assert torch.equal(out, expected)
    channels_last = base[:3, :10, :7, :5].to(memory_format=torch.channels_last)
    assert torch.equal(dense_block(channels_last, block.layers)[0], dense_block(base[:3, :10, :7, :5], block.layers)[0])


def test_output_is_channels_last(device):
    for tail in ("none", "transition", "norm"):
        out, _ = Block(Case(tail=tail, device=device)).run()
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_neither_layers_nor_tail(device):
    block = Block(Case(num_layers=0, device=device))
    out, statistics = block.run()
    assert torch.equal(out, block.input) and not statistics.var.any()
    grad = block.normal(*out.shape)
    assert torch.equal(block.gradients(out, grad)["input"], grad)


def test_empty_batch(device):
    block = Block(Case(batch=0, frozen=ALL, tail="transition", device=device))
    out, _ = block.run()
    assert out.shape == (0, 7, 3, 2)
    grads = block.gradients(out, torch.zeros_like(out))
    assert all(grads[name].abs().sum() == 0 for name in grads)


def with_conv2(block: Block, conv2: Tensor) -> tuple[Tensor, list[LayerWeights]]:
    return block.input, [block.layers[0]._replace(conv2=conv2), *block.layers[1:]]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "3 to 5 dimensions", lambda b: (b.input[:, :, 0, 0], b.layers)),
        (ValueError, "more than 1 value per channel", lambda b: (b.input[:1, :, :1, :1], b.layers)),
        (ValueError, r"input to have 10 channels in dimension 1", lambda b: (b.input[:, :9], b.layers)),
        (TypeError, "input to be torch.float64", lambda b: (b.input.float(), b.layers)),
        (TypeError, "float32, float64, float16 or bfloat16", lambda b: (torch.zeros(2, 10, 3, 3).long(), [])),
        (ValueError, "on cpu like input, got meta", lambda b: with_conv2(b, b.layers[0].conv2.to("meta"))),
        (ValueError, "kernel of layer 0.conv2 to be odd", lambda b: with_conv2(b, b.normal(6, 20, 2, 2))),
        (ValueError, "layer 1.conv2.weight to have shape", lambda b: with_conv2(b, b.normal(6, 20, 1, 3))),
    ],
)  # fmt: skip
def test_errors(error, message, arguments):
    block = Block(Case())
    with pytest.raises(error, match=message):
        dense_block(*arguments(block))


def test_errors_of_options():
    block = Block(Case())
    with pytest.raises(ValueError, match="memory to be one of"):
        dense_block(block.input, block.layers, memory="tiny")
    with pytest.raises(ValueError, match="probability"):
        dense_block(block.input, block.layers, drop_rate=1.5, seed=block.seed)
    with pytest.raises(ValueError, match="seed to be given"):
        dense_block(block.input, block.layers, drop_rate=0.5)
    with pytest.raises(TypeError, match="dense_block: expected seed to be int64, got float32"):
        dense_block(block.input, block.layers, drop_rate=0.5, seed=torch.zeros(()))
    with pytest.raises(ValueError, match=r"dense_block: expected seed to have 0 dimensions, got shape \[1\]"):
        dense_block(block.input, block.layers, drop_rate=0.5, seed=block.seed[None])
    tail = Block(Case(tail="transition")).tail
    with pytest.raises(ValueError, match="at least 2 in front of the transition"):
        dense_block(block.input[..., :1], block.layers, tail=tail)


def with_act(block: Block, act: Activation) -> tuple[Tensor, list[LayerWeights]]:
    return block.input, [layer._replace(act1=act) for layer in block.layers]


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("every one of activations to be relu, .*, got swish", lambda b: with_act(b, Activation("swish"))),
        ("of celu to be alpha above 0 and 0, got 0 and 0", lambda b: with_act(b, Activation("celu"))),
        ("of silu to be 0 and 0, got 1 and 0", lambda b: with_act(b, Activation("silu", 1.0))),
        ("of softplus to be beta above 0", lambda b: with_act(b, Activation("softplus", -1.0, 20.0))),
        ("activation_parameters to be finite, got nan", lambda b: with_act(b, Activation("elu", float("nan")))),
        (r"layer 0.act1.weight to be given, as the activation is prelu", lambda b: with_act(b, Activation("prelu"))),
        (r"layer 1.act1.weight to have shape \[16\]", lambda b: with_act(b, Activation("prelu", weight=b.normal(10)))),
        (r"layer 0.act1.weight to be absent", lambda b: with_act(b, Activation("silu", weight=b.normal(10)))),
        (
            r"layer 0.conv2.bias to have shape \[6\], got \[7\]",
            lambda b: (b.input, [b.layers[0]._replace(bias2=b.normal(7)), *b.layers[1:]]),
        ),
    ],
)  # fmt: skip
def test_errors_of_activations_and_biases(message, arguments):
    with pytest.raises(ValueError, match=f"dense_block: expected .*{message}"):
        dense_block(*arguments(Block(Case())))


def running(device: str, *sizes: int):
    means, variances = [torch.zeros(n, device=device) for n in sizes], [torch.ones(n, device=device) for n in sizes]
    return means, variances, [torch.tensor(0, device=device) for _ in sizes]


def test_running_statistics_follow_batch_norm(device):
    x = torch.randn(4, 6, 5, 5).to(device)
    norms = [torch.nn.BatchNorm2d(4).to(device), torch.nn.BatchNorm2d(6, momentum=None).to(device)]
    means, variances, tracked = running(device, 4, 6)
    for _ in range(3):
        x = x * 1.5 + 1
        for norm in norms:
            norm(x[:, : norm.num_features])
        mean, var = reference.batch_statistics(x)
        update_running_stats_(means, variances, tracked, mean, var, [0, 0], [0.1, None], 100)
    for i, norm in enumerate(norms):
        torch.testing.assert_close(means[i], norm.running_mean)
        torch.testing.assert_close(variances[i], norm.running_var)
        assert tracked[i] == norm.num_batches_tracked


def test_running_statistics_are_untouched_after_an_error(device):
    means, variances, tracked = running(device, 4, 6)
    arguments = (means, variances, tracked, torch.ones(8, device=device), torch.ones(8, device=device))
    for offsets, count, message in (([0, 3], 100, "offsets"), ([0, 0], 1, "count"), ([0], 100, "2 entries")):
        with pytest.raises(ValueError, match=message):
            update_running_stats_(*arguments, offsets, [0.1] * len(offsets), count)
    assert all(m.abs().sum() == 0 for m in means)
    assert all(t == 0 for t in tracked)


def test_update_of_strided_statistics(device):
    base = torch.full((6,), 7.0, device=device)
    base[::2] = 0
    mean, var = torch.arange(6.0, device=device)[::2], torch.ones(6, device=device)[::2]
    variance, tracked = torch.ones(3, device=device), torch.tensor(0, device=device)
    update_running_stats_([base[::2]], [variance], [tracked], mean, var, [0], [0.5], 10)
    assert base.tolist() == [0.0, 7.0, 1.0, 7.0, 2.0, 7.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_many_norms_of_any_type_are_updated(device, dtype):
    """More than one launch takes, some with a type of their own."""
    means, variances, tracked = running(device, *range(1, 61))
    for i in range(0, 60, 2):
        means[i], variances[i] = means[i].to(dtype), variances[i].to(dtype)
    mean, var = torch.randn(70, device=device), torch.rand(70, device=device)
    update_running_stats_(means, variances, tracked, mean, var, list(range(10)) * 6, [0.5, None] * 30, 10)
    for i, (m, v, t) in enumerate(zip(means, variances, tracked, strict=True)):
        part, factor = slice(i % 10, i % 10 + i + 1), (0.5, 1.0)[i % 2]
        torch.testing.assert_close(m, (factor * mean[part]).to(m.dtype), rtol=1e-2, atol=1e-6)
        torch.testing.assert_close(v, (1 + factor * (var[part] / 0.9 - 1)).to(v.dtype), rtol=1e-2, atol=1e-6)
        assert t == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tracked": torch.zeros(0, dtype=torch.long)}, "num_batches_tracked to be one number"),
        ({"mean": torch.ones(3).half(), "var": torch.ones(3).half()}, "mean to be float32 or float64, got float16"),
        ({"var": torch.ones(3).double()}, "var to be float32 like mean"),
        ({"running_mean": torch.zeros(1).expand(3)}, "memory of its own"),
        ({"running_mean": torch.zeros(3, 1)}, "running_mean to have 1 dimensions"),
    ],
)
def test_update_refuses_bad_tensors_before_it_writes(change, message):
    a = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "tracked": torch.tensor(0)}
    a |= {"mean": torch.ones(3), "var": torch.ones(3)} | change
    before = {name: t.clone() for name, t in a.items()}
    with pytest.raises((ValueError, TypeError), match=f"update_running_stats_: expected .*{message}"):
        update_running_stats_(
            [a["running_mean"]], [a["running_var"]], [a["tracked"]], a["mean"], a["var"], [0], [0.1], 10
        )
    assert all(torch.equal(a[name], before[name]) for name in a)


@pytest.mark.parametrize("tail", ["none", "transition"])
def test_gradients_lie_as_their_parameters(device, tail):
    """The engine copies others, and DDP warns of them."""
    block = Block(Case(tail=tail, device=device))
    for parameter in block.parameters:
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    out, _ = block.run()
    gradients = torch.autograd.grad(out.sum(), block.parameters)
    assert [g.stride() for g in gradients] == [p.stride() for p in block.parameters]

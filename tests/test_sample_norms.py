# SPDX-License-Identifier: Apache-2.0
"""Instance and group norms in the dense block operator, against the concatenating reference."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastdense import reference
from fastdense.ops import (
    Activation,
    LayerWeights,
    NormWeights,
    TailWeights,
    dense_block,
    dual_path_stage,
    norm_relu_max_pool,
)
from tests.cases.dense_block import ALL, Block, Case
from tests.cases.dual_path import Stage, StageCase
from tests.cases.random_block import (
    check,
    check_any_output_gradient,
    check_bit_identical,
    check_one_gradient,
    low_precision_errors,
    relative,
)
from tests.cases.simd import LEVELS, has_level, simd_level

KINDS = {"instance": -1, "two groups": 2, "one group": 1, "groups that cut others": 4}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def groups(request: pytest.FixtureRequest) -> Iterator[int]:
    yield request.param


@pytest.mark.parametrize("memory", ["balanced", "min"])
@pytest.mark.parametrize("tail", ["none", "transition", "norm", "norm_relu"])
@pytest.mark.parametrize("width", [20, 0], ids=["bottleneck", "plain"])
@pytest.mark.parametrize("size", [(9,), (7, 5), (5, 4, 3)], ids=["1d", "2d", "3d"])
def test_parity(size, width, tail, memory, groups):
    check(Block(Case(size=size, width=width, tail=tail, memory=memory, norm_groups=groups)))


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, tail="transition"),
        Case(size=(2, 2), tail="transition", batch=5),
        Case(size=(40, 24), tail="transition", batch=3),
        Case(size=(33, 20), width=0, tail="norm_relu", batch=4),
        Case(frozen=ALL, tail="transition"),
        Case(frozen=("norm1",), tail="transition"),
        Case(frozen=("norm2",), tail="norm"),
        Case(frozen=("0.norm", "tail"), width=0, tail="norm_relu"),
        Case(affine=False, tail="transition"),
        Case(drop_rate=0.3, tail="transition"),
        Case(active=(True, False, True), tail="norm", memory="min"),
        Case(active=(False, True, False), width=0, tail="transition"),
        Case(num_layers=0, tail="transition"),
        Case(num_layers=0, tail="norm_relu"),
        Case(in_channels=140, growth_rate=36, width=40, num_layers=2, tail="transition", batch=5),
        Case(tail="transition", bias=True, acts=(Activation("prelu"), Activation("gelu"))),
        Case(tail="norm_relu", width=0, bias=True, acts=(Activation("leaky_relu", 0.1),), memory="min"),
    ],
    ids=str,
)
def test_parity_of_special_cases(case, groups):
    check(Block(replace(case, norm_groups=groups)))


def test_groups_of_layers_may_differ(groups):
    """One layer's cut the channels of another's."""
    block = Block(Case(in_channels=12, growth_rate=6, width=24, norm_groups=2, tail="transition"))
    for index, (first, second) in enumerate(((3, 24), (18, 1), (4, groups if groups > 0 else 24))):
        layer = block.layers[index]
        assert layer.norm2 is not None
        block.layers[index] = layer._replace(
            norm1=layer.norm1._replace(groups=first), norm2=layer.norm2._replace(groups=second)
        )
    block.tail = block.tail._replace(norm=block.tail.norm._replace(groups=5))
    check(block)


@pytest.mark.parametrize("level", LEVELS)
def test_every_simd_level_of_this_machine(level, groups):
    if not has_level(level):
        return
    with simd_level(level):
        check(Block(Case(in_channels=37, growth_rate=5, width=19, tail="transition", size=(9, 8), norm_groups=groups)))
        check(Block(Case(dtype=torch.float32, in_channels=37, tail="transition", norm_groups=groups)), tolerance=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", ["balanced", "min"])
def test_low_precision_is_no_worse_than_torch(memory, dtype, groups):
    shape = Case(batch=4, in_channels=24, growth_rate=12, width=48, num_layers=4, size=(12, 12), tail="transition")
    ours, theirs = low_precision_errors(Block, replace(shape, dtype=dtype, memory=memory, norm_groups=groups))
    assert sum(ours) <= 1.5 * sum(theirs)


def test_memory_modes_are_bit_identical(groups):
    case = Case(dtype=torch.float32, tail="transition", size=(24, 24), drop_rate=0.2, norm_groups=groups)
    check_bit_identical(Block(case), ["balanced", "min", "balanced"])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_numbers_of_threads(threads, groups):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(Block(Case(batch=5, size=(20, 10), tail="transition", norm_groups=groups)))
        check(Block(Case(batch=1, size=(20, 10), tail="transition", norm_groups=groups)))
    finally:
        torch.set_num_threads(before)


def test_gradcheck(groups):
    block = Block(Case(2, 4, 2, 2, 4, (4, 2), "transition", norm_groups=groups), seed=3)
    assert torch.autograd.gradcheck(lambda *_: block.run()[0], [block.input, *block.parameters], fast_mode=True)


@pytest.mark.parametrize("part", ["input", "0.norm1.weight", "1.norm2.bias", "tail.norm.weight", "2.conv1", "0.conv2"])
def test_only_what_needs_a_gradient_gets_one(part, groups):
    check_one_gradient(Block(Case(tail="transition", norm_groups=groups)), part)


def test_any_output_gradient(groups):
    check_any_output_gradient(Block(Case(tail="transition", norm_groups=groups)))


def test_what_is_saved():
    for memory, per_pixel in (("balanced", 28 + 3 * 20), ("min", 28)):
        block = Block(Case(dtype=torch.float32, memory=memory, norm_groups=2))
        assert block.saved_numbers() == 3 * 7 * 5 * per_pixel + 2 * 3 * (28 + 3 * 20) + 1  # the seed


def test_samples_do_not_depend_on_each_other(groups):
    """Which is what differential privacy needs."""
    block = Block(Case(batch=4, tail="transition", norm_groups=groups))
    out, statistics = block.run()
    first, its_statistics = dense_block(block.input[1:2], block.layers, tail=block.tail)
    assert relative(out[1:2], first) < 1e-14
    assert relative(statistics.mean[1:2], its_statistics.mean) < 1e-14


def test_a_large_mean_keeps_the_digits_of_torch(groups):
    """Statistics are those of deviations, not of squares."""
    case = Case(batch=2, in_channels=24, size=(16, 16), dtype=torch.float32, norm_groups=groups)
    block, exact = Block(case), Block(replace(case, dtype=torch.float64))
    for b in (block, exact):
        b.input = (b.input.detach() + 1000).float().to(b.case.dtype)
    with torch.no_grad():
        for target, source in zip(exact.parameters, block.parameters, strict=True):
            target.copy_(source)
        exact.input = block.input.double()
        truth, _ = exact.expected()
        ours, theirs = (relative(run()[0].double(), truth) for run in (block.run, block.expected))
    assert ours <= 1.5 * theirs


def norm(groups: int, channels: int = 8) -> NormWeights:
    ones = torch.ones(channels, dtype=torch.float64)
    return NormWeights(ones, ones, None, None, 1e-5, groups)


def run(groups: int, size: tuple[int, ...]) -> Tensor:
    x = torch.randn(size, dtype=torch.float64)
    return dense_block(x, [], tail=TailWeights(norm(groups), None))[0]


def with_norms(block: Block, **groups: int) -> tuple[Tensor, list[LayerWeights]]:
    layers = [
        layer._replace(**{name: getattr(layer, name)._replace(groups=number) for name, number in groups.items()})
        for layer in block.layers
    ]
    return block.input, layers


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("groups of tail.norm to divide its 8 channels, got 3", lambda: run(3, (2, 8, 4))),
        ("groups of tail.norm to be at least 1 .*, got -1", lambda: run(-1, (2, 8, 4))),
        ("more than 1 value per channel when training", lambda: run(8, (1, 8, 1))),
        ("groups of layer 0.norm2 to be at least 1 .*, not statistics of the batch, got 0",
         lambda: dense_block(*with_norms(Block(Case()), norm1=2, norm2=0))),
        ("groups of layer 0.norm2 to divide its 20 channels, got 3",
         lambda: dense_block(*with_norms(Block(Case()), norm1=2, norm2=3))),
    ],
)  # fmt: skip
def test_errors(message, call):
    with pytest.raises(ValueError, match=f"dense_block: expected .*{message}"):
        call()


def test_one_value_of_several_is_normalised_as_by_torch():
    """The statistics of a group or of a batch of more than one value are those of torch, even if each set has one."""
    torch.testing.assert_close(run(8, (2, 8, 1)), torch.ones(2, 8, 1, dtype=torch.float64))
    x = torch.randn(1, 8, 1, dtype=torch.float64)
    expected = torch.nn.functional.group_norm(x, 4, norm(4).weight, norm(4).bias).relu()
    torch.testing.assert_close(dense_block(x, [], tail=TailWeights(norm(4), None))[0], expected)


def test_other_operators_refuse_groups():
    with pytest.raises(ValueError, match="norm_relu_max_pool: expected batch norms, groups 0, got 4"):
        norm_relu_max_pool(torch.ones(2, 8, 4, 4).double(), norm(4), [2, 2], [2, 2], [0, 0])
    stage = Stage(StageCase())
    blocks = [block._replace(norm_a=block.norm_a._replace(groups=1)) for block in stage.blocks]
    with pytest.raises(ValueError, match="dual_path_stage: expected batch norms, groups 0, got 1"):
        dual_path_stage(stage.input, blocks, residual_channels=stage.case.residual_channels)


def test_the_reference_is_torch_itself():
    x = torch.randn(3, 8, 5, 4, dtype=torch.float64)
    for groups, module in (
        (8, torch.nn.InstanceNorm2d(8)),
        (2, torch.nn.GroupNorm(2, 8)),
        (8, torch.nn.GroupNorm(8, 8)),
    ):
        plain = NormWeights(None, None, None, None, 1e-5, groups)
        tail = TailWeights(plain, None, relu=False)
        torch.testing.assert_close(reference.dense_block(x, [], tail=tail)[0], module.double()(x))
        torch.testing.assert_close(dense_block(x, [], tail=tail)[0], module.double()(x))

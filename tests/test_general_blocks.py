# SPDX-License-Identifier: Apache-2.0
"""Dense blocks with any norm, activation and bias by the CUDA code: emulated in both orders of threads, and on CUDA."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fastdense.ops import Activation
from tests.cases.dense_block import ACTIVATIONS, ALL, EMULATED_SCRATCH, Block, Case
from tests.cases.random_block import (
    check,
    check_any_output_gradient,
    check_bit_identical,
    check_one_gradient,
    low_precision_errors,
)
from tests.emulation.blocks import DEVICES, emulated_kernels, on_device

TWO = (Activation("prelu"), Activation("silu"))
GROUPS = {"instance": -1, "two groups": 2, "one group": 1, "groups that cut others": 4}


@pytest.fixture(params=DEVICES[1:])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with on_device(request.param, EMULATED_SCRATCH) as device:
        yield device


@pytest.fixture(params=GROUPS.values(), ids=GROUPS)
def groups(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda act: act.name)
def test_every_activation(device, act):
    for case in (
        Case(tail="transition", bias=True),
        Case(tail="norm_relu", width=0, size=(9,), slopes=1),
        Case(tail="none", size=(4, 3, 3), memory="min", drop_rate=0.3, num_layers=2, bias=True),
    ):
        check(Block(replace(case, acts=(act,), device=device)))


@pytest.mark.parametrize(
    "case",
    [
        Case(acts=TWO, tail="norm_relu", frozen=ALL),
        Case(acts=TWO, tail="transition", frozen=("1.norm1", "2.norm2"), memory="min"),
        Case(acts=TWO, tail="norm", affine=False),
        Case(acts=TWO, tail="transition", active=(False, True, False)),
        Case(acts=TWO, tail="transition", num_layers=0),
        Case(acts=TWO, tail="norm_relu", num_layers=0),
        Case(acts=TWO, tail="transition", in_channels=140, growth_rate=36, width=40, num_layers=2, batch=5),
        Case(acts=(Activation("relu"), Activation("gelu"), Activation("leaky_relu", 0.2)), width=0, size=(40, 24)),
        Case(bias=True, tail="transition", size=(24, 9)),
        Case(bias=True, width=0, tail="norm"),
    ],
    ids=str,
)
def test_activations_and_biases_of_special_blocks(device, case):
    check(Block(replace(case, device=device)))


@pytest.mark.parametrize(
    "case",
    [
        Case(tail="transition", size=(4, 3, 3)),
        Case(tail="norm_relu", width=0),
        Case(tail="none", size=(9,), memory="min", drop_rate=0.3),
        Case(tail="transition", batch=1),
        Case(tail="transition", size=(2, 2), batch=5),
        Case(tail="transition", size=(40, 24), num_layers=2),
        Case(tail="norm_relu", frozen=ALL),
        Case(tail="transition", frozen=("1.norm1",), affine=False),
        Case(tail="norm", frozen=("norm2",), memory="min"),
        Case(tail="norm", active=(True, False, True)),
        Case(tail="norm_relu", num_layers=10, in_channels=8, growth_rate=2, width=8),
        Case(tail="transition", active=(False, True, False), width=0),
        Case(tail="transition", num_layers=0),
        Case(tail="transition", acts=TWO, bias=True),
        Case(tail="norm_relu", width=0, acts=(Activation("gelu"),), bias=True),
    ],
    ids=str,
)
def test_norms_of_samples(device, groups, case):
    check(Block(replace(case, norm_groups=groups, device=device)))


@pytest.mark.parametrize("size", [(1,), (2, 2, 2), (7, 7)], ids=["1 pixel", "8 pixels", "49 pixels"])
def test_samples_of_few_pixels(device, size, groups):
    """No block of threads has rows of two samples."""
    if size == (1,) and groups < 0:
        return  # a norm of single values gives its bias, and gradients of rounding
    tail = "norm_relu" if size == (1,) else "transition"
    check(Block(Case(size=size, batch=7, tail=tail, in_channels=12, norm_groups=groups, device=device)))


@pytest.mark.parametrize("groups", [1, 2, 40, -1])
def test_groups_of_more_channels_than_a_block_has_threads(device, groups):
    """A block of threads goes through such a group in parts."""
    case = Case(in_channels=1080, growth_rate=40, width=280, size=(3, 2), num_layers=1, batch=2, tail="norm_relu")
    check(Block(replace(case, norm_groups=groups, device=device)))


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("norm_groups", [0, 2])
def test_results_do_not_depend_on_the_order_of_threads(backwards, norm_groups):
    case = Case(dtype=torch.float32, tail="transition", acts=TWO, bias=True, norm_groups=norm_groups)
    block, results = Block(case), []
    for order in (False, backwards):
        with emulated_kernels(order, EMULATED_SCRATCH, 8, early_copies=order):
            out, statistics = block.run()
            results.append([out, *statistics, *block.gradients(out, torch.ones_like(out)).values()])
    assert all(map(torch.equal, *results))


def count_launches(case: Case, workspace_bytes: int = 1 << 20) -> int:
    block = Block(case)
    with emulated_kernels(False, workspace_bytes, 64) as library:
        before = library.launches()
        library.skip_launches(True)
        try:
            out, _ = block.run()
            block.gradients(out, torch.ones_like(out))
            return library.launches() - before
        finally:
            library.skip_launches(False)


@pytest.mark.parametrize("width", [16, 0], ids=["bottleneck", "plain"])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 2, 2), (7, 7)], ids=["1 pixel", "8 pixels", "49 pixels"])
def test_no_sample_has_launches_of_its_own(size, width):
    """Norms of samples start at most a tenth more kernels than batch norm does by the library's way."""
    case = Case(size=size, width=width, in_channels=16, growth_rate=8, num_layers=6, batch=24, tail="norm_relu")
    batch_norm = count_launches(case)
    for groups in GROUPS.values():
        assert count_launches(replace(case, norm_groups=groups)) <= 1.1 * batch_norm
        assert count_launches(replace(case, norm_groups=groups, batch=3)) <= 1.1 * batch_norm
    assert count_launches(replace(case, acts=TWO)) <= 1.1 * batch_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_groups", [0, -1, 2], ids=["batch", "instance", "group"])
@pytest.mark.parametrize("act", ["silu", "gelu", "tanh"])
def test_low_precision_is_no_worse_than_torch(device, dtype, norm_groups, act):
    """Smooth activations: at a kink, a number that rounds to its other side changes gradients by more than rounding."""
    shape = Case(batch=4, in_channels=24, growth_rate=12, width=48, num_layers=3, size=(8, 6), tail="transition")
    case = replace(shape, dtype=dtype, norm_groups=norm_groups, acts=(Activation(act),), device=device)
    case = replace(case, bias=norm_groups == 2)  # behind other norms its gradient is rounding
    ours, theirs = low_precision_errors(Block, case)
    assert sum(ours) <= (1.5 if dtype == torch.float32 else 1.0) * sum(theirs)


@pytest.mark.parametrize("norm_groups", [0, -1, 2], ids=["batch", "instance", "group"])
def test_memory_modes_are_bit_identical(device, norm_groups):
    case = Case(dtype=torch.float32, tail="transition", drop_rate=0.2, norm_groups=norm_groups, acts=TWO, bias=True)
    check_bit_identical(Block(replace(case, device=device)), ["balanced", "min", "recompute", "balanced"])


@pytest.mark.parametrize(
    "part",
    [
        "input",
        "0.norm1.weight",
        "1.norm2.bias",
        "1.act1.weight",
        "2.act2.weight",
        "tail.act.weight",
        "2.conv1",
        "0.conv1.bias",
        "2.conv2.bias",
        "tail.conv.bias",
        "0.conv2",
    ],
)
@pytest.mark.parametrize("norm_groups", [0, 2], ids=["batch", "group"])
def test_only_what_needs_a_gradient_gets_one(device, part, norm_groups):
    frozen = ("norm2", "tail") if norm_groups == 0 else ()  # behind whose statistics the gradient of a bias vanishes
    case = Case(tail="transition", acts=(Activation("prelu"),), frozen=frozen, bias=True, norm_groups=norm_groups)
    check_one_gradient(Block(replace(case, device=device)), part)


def test_any_output_gradient(device):
    for norm_groups in (0, 2):
        case = Case(tail="transition", norm_groups=norm_groups, acts=TWO)
        check_any_output_gradient(Block(replace(case, device=device)))

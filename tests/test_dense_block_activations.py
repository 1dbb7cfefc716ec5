# SPDX-License-Identifier: Apache-2.0
"""Dense blocks with other activations than ReLU, and with biases, against the concatenating reference."""

from dataclasses import replace

import pytest
import torch

from fastdense import reference
from fastdense.ops import Activation, dense_block
from tests.cases.dense_block import ACTIVATIONS, ALL, Block, Case
from tests.cases.random_block import check, check_bit_identical, check_one_gradient, low_precision_errors, relative


@pytest.mark.parametrize("size", [(9,), (9, 12), (5, 4, 3)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda act: act.name)
def test_every_activation(act, size):
    wide = Case(size=size, in_channels=140, growth_rate=36, width=40, num_layers=2)
    for case in (
        Case(size=size, tail="transition"),
        Case(size=size, tail="transition", memory="min", bias=True, slopes=1),
        Case(size=size, tail="norm_relu", width=0, bias=True),
        Case(size=size, tail="norm_relu", frozen=ALL, bias=True),
        Case(size=size, tail="none", frozen=("1.norm1", "2.norm2"), width=0, drop_rate=0.3),
        replace(wide, tail="transition", bias=True, batch=5),
        replace(wide, tail="norm_relu", memory="min", active=(False, True), drop_rate=0.2, bias=True),
    ):
        check(Block(replace(case, acts=(act,))))


def test_activations_of_a_block_may_differ():
    for width in (20, 0):
        acts = (Activation("prelu"), Activation("gelu"), Activation("relu"), Activation("leaky_relu", 0.2))
        check(Block(Case(acts=acts, width=width, num_layers=4, tail="transition", bias=True)))
        check(Block(Case(acts=acts[:3], width=width, num_layers=4, tail="norm")))


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda act: act.name)
def test_gradcheck_of_every_activation(act):
    block = Block(Case(2, 3, 2, 2, 4, (4, 2), "transition", acts=(act,), bias=True), seed=3)
    assert torch.autograd.gradcheck(lambda *_: block.run()[0], [block.input, *block.parameters], fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda act: act.name)
def test_activations_in_low_precision_are_no_worse_than_those_of_torch(act, dtype):
    shape = Case(batch=4, in_channels=24, growth_rate=12, width=48, num_layers=4, size=(12, 12), tail="transition")
    ours, theirs = low_precision_errors(Block, replace(shape, dtype=dtype, acts=(act,), slopes=1))
    assert sum(ours) <= 1.5 * sum(theirs)


def test_memory_modes_of_other_activations_are_bit_identical():
    case = Case(dtype=torch.float32, tail="transition", size=(24, 24), drop_rate=0.2, bias=True)
    for act in ("prelu", "mish"):
        check_bit_identical(Block(replace(case, acts=(Activation(act),))), ["balanced", "min", "recompute", "balanced"])


def test_activations_save_nothing():
    for memory, per_pixel in (("balanced", 28 + 3 * 20), ("min", 28)):
        block = Block(Case(dtype=torch.float32, memory=memory, acts=(Activation("gelu"),), bias=True))
        assert block.saved_numbers() == 3 * 7 * 5 * per_pixel + 2 * (28 + 3 * 20) + 1  # the seed


@pytest.mark.parametrize(
    "part",
    ["input", "1.act1.weight", "2.act2.weight", "tail.act.weight", "0.conv1.bias", "2.conv2.bias", "tail.conv.bias"],
)
def test_only_what_needs_a_gradient_gets_one_of_activations_and_biases(part):
    check_one_gradient(
        Block(Case(tail="transition", acts=(Activation("prelu"),), frozen=("norm2", "tail"), bias=True)), part
    )


def test_a_prelu_of_several_norms_adds_up():
    block = Block(Case(tail="none", acts=(Activation("silu"),)))
    act = Activation("prelu", weight=torch.tensor([0.3], dtype=torch.float64, requires_grad=True))
    layers = [layer._replace(act1=act, act2=act) for layer in block.layers]
    out, _ = dense_block(block.input, layers)
    expected, _ = reference.dense_block(block.input, layers)
    grad = block.normal(*out.shape)
    made, wanted = (torch.autograd.grad(y, act.weight, grad)[0] for y in (out, expected))
    assert relative(made, wanted) < 1e-12

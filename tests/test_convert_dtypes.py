# SPDX-License-Identifier: Apache-2.0
"""Converted networks of other types and memory layouts, and under autocast."""

import copy

import pytest
import torch
import torch._dynamo.testing
import torchvision.models.densenet as tv_densenet
from torch import Tensor, nn

import fastdense
from tests.cases.converted import (
    MEMORY,
    NETS,
    assert_bit_equal,
    assert_same,
    fused_calls,
    images,
    norms,
    pair,
    randomise,
    step,
    torchvision_net,
)
from tests.cases.random_block import relative

# A block that falls back where the test does not expect it fails the test.
pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]


def float32_pair(make):
    """A float64 net for the truth, and a plain and two converted float32 ones."""
    exact = make()
    plain = copy.deepcopy(exact).float()
    return exact, plain, [fastdense.convert(copy.deepcopy(plain), memory=memory) for memory in MEMORY]


def assert_no_worse(actual: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], factor: float = 2):
    """Error against float64 at most twice torch's own, for the output and for all gradients together."""
    names = [name for name in exact if name.startswith("grad")]

    def errors(made):
        gradients = [torch.cat([grads[n].double().flatten() for n in names]) for grads in (made, exact)]
        return relative(made["out"].double(), exact["out"]), relative(*gradients)

    for mine, theirs in zip(errors(actual), errors(plain), strict=True):
        assert mine <= factor * theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_autocast(make, dtype):
    exact, plain, fast = float32_pair(make)
    x = images(4)
    truth = step(exact, x)

    def run(net):
        return step(net, x.float(), run=torch.autocast("cpu", dtype=dtype)(net))

    expected, actual = run(plain), [run(net) for net in fast]
    assert actual[0]["out"].dtype == expected["out"].dtype == dtype
    assert {n: v.dtype for n, v in actual[0].items()} == {n: v.dtype for n, v in expected.items()}
    for other in actual[1:]:
        assert_bit_equal(other, actual[0])
    assert_no_worse(actual[0], expected, truth)


def test_autocast_of_inner_outputs_has_the_plain_dtype():
    _, plain, (fast, *_) = float32_pair(torchvision_net)
    dtypes = []
    for net in (plain, fast):
        seen = []
        for name in ("denseblock1", "transition1", "denseblock2", "norm5"):
            getattr(net.features, name).register_forward_hook(lambda m, args, out, seen=seen: seen.append(out.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            net(images().float())
        dtypes.append(seen)
    assert dtypes[0] == dtypes[1] == [torch.bfloat16] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nets_of_another_dtype(dtype):
    exact, plain, fast = float32_pair(torchvision_net)
    x = images(4)
    truth = step(exact, x)
    expected = step(plain.to(dtype), x.to(dtype))
    actual = [step(net.to(dtype), x.to(dtype)) for net in fast]
    assert {n: v.dtype for n, v in actual[0].items()} == {n: v.dtype for n, v in expected.items()}
    for other in actual[1:]:
        assert_bit_equal(other, actual[0])
    assert_no_worse(actual[0], expected, truth)


def test_double_after_the_conversion():
    plain = torchvision_net().float()
    fast = fastdense.convert(copy.deepcopy(plain)).double()
    plain.double()
    x = images()
    assert_same(step(fast, x), step(plain, x))


def test_norms_kept_in_float32():
    exact, plain, fast = float32_pair(torchvision_net)
    x = images(4)
    truth = step(exact, x)
    for net in (plain, *fast):
        net.bfloat16()
        for norm in norms(net):
            norm.float()
    expected, actual = step(plain, x.bfloat16()), [step(net, x.bfloat16()) for net in fast]
    assert {n: v.dtype for n, v in actual[0].items()} == {n: v.dtype for n, v in expected.items()}
    assert_no_worse(actual[0], expected, truth)


def test_channels_last_model_and_input():
    plain, fast = pair()
    x = images()
    expected = step(plain, x)
    fast.to(memory_format=torch.channels_last)
    assert_same(step(fast, x.to(memory_format=torch.channels_last)), expected)


LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 8, 10, 8, dtype=torch.float64),
    "channels last": lambda: torch.randn(2, 8, 10, 8, dtype=torch.float64).to(memory_format=torch.channels_last),
    "slice of a bigger tensor": lambda: torch.randn(4, 11, 20, 9, dtype=torch.float64)[::2, 2:10, ::2, 1:],
    "transposed": lambda: torch.randn(2, 8, 8, 10, dtype=torch.float64).transpose(2, 3),
    "expanded batch": lambda: torch.randn(1, 8, 10, 8, dtype=torch.float64).expand(2, -1, -1, -1),
    "expanded channels": lambda: torch.randn(2, 1, 10, 8, dtype=torch.float64).expand(-1, 8, -1, -1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_inputs_of_any_layout(name):
    def make():
        modules = [tv_densenet._DenseBlock(2, 8, 4, 6, 0.0), tv_densenet._Transition(20, 10)]
        return randomise(nn.Sequential(*modules, tv_densenet._DenseBlock(1, 10, 4, 6, 0.0)).double())

    plain, fast = pair(make)
    x = LAYOUTS[name]()
    before = x.clone()
    assert_same(step(fast, x), step(plain, x))
    assert torch.equal(x, before)
    assert fused_calls(fast, x) == [(2, "transition"), (1, "none")]


def test_empty_batch():
    plain, fast = pair()
    x = images(0)
    assert_same(step(fast.eval(), x), step(plain.eval(), x))
    assert_same(step(fast.train(), x), step(plain.train(), x))


def test_wrong_inputs_raise_as_plain_ones_do():
    block = tv_densenet._DenseBlock(2, 8, 4, 6, 0.0)
    plain, fast = block, fastdense.convert(copy.deepcopy(block))
    for shape in ((2, 7, 6, 6), (8, 6, 6), (2, 8, 6)):
        for net in (plain, fast):
            with pytest.raises((RuntimeError, ValueError)):
                net(torch.randn(shape))

# SPDX-License-Identifier: Apache-2.0
"""Dense layers as people write them: which are fused, which go on a shared buffer, and that none keeps too much."""

import copy
import re

import pytest
import torch
from torch import nn

import fastdense
from fastdense.fusion.saved_memory import saved_bytes_per_image
from tests.cases.converted import assert_same, fastdense_warnings, one_warning, randomise, step
from tests.cases.layer_forms import (
    C0,
    FORMS,
    Block,
    BlockAttention,
    Checkpointed,
    K,
    SqueezeExcite,
    attentive_net,
    norm_act,
    post_activation,
)

pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]

FUSED = ["norm, act", "no 1x1", "reentrant", "non-reentrant"]
FUSED += [f"{layer}kernel {kernel}" for layer in ("", "no 1x1, ") for kernel in (1, 5, 7)]
SHARED = {
    "dilation": "dilation=\\(2, 2\\)",
    "no 1x1, dilation": "dilation=\\(3, 3\\)",
    "act, norm": "its results differ from those of a dense block",
    "post-activation": "is Conv2d, BatchNorm2d, Conv2d, BatchNorm2d: expected norm, convolution",
    "post-activation, no 1x1": "is Conv2d, InstanceNorm2d: expected norm, convolution",
    "both norms": "some of its norms take statistics of the batch, others of each sample",
    "squeeze and excite": "its layers have Linear: expected only",
    "attention": "expected norm, convolution, or norm, 1x1 convolution, norm, convolution",
    "reentrant, post-activation": "is Conv2d, BatchNorm2d, Conv2d, BatchNorm2d: expected",
    "non-reentrant, post-activation": "is Conv2d, BatchNorm2d, Conv2d, BatchNorm2d: expected",
}
GROWTHS = (4, 6, 2, 3)


def net(block: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomise(nn.Sequential(nn.Conv2d(3, C0, 1), block).double())


def of_form(name: str, growths: tuple[int, ...] = (K, K, K)) -> nn.Module:
    return net(Block(FORMS[name], growths))


def converted(plain: nn.Module, memory: str) -> tuple[nn.Module, list[str]]:
    """A converted copy and its warnings, but for those of statistics that plain modules move twice."""
    with fastdense_warnings() as messages:
        fast = fastdense.convert(copy.deepcopy(plain), memory=memory)
    return fast, [message for message in messages if "move running statistics twice" not in message]


def runs(model: nn.Module) -> list[str]:
    return [row.runs for row in fastdense.report(model).rows]


def assert_same_steps(fast: nn.Module, plain: nn.Module) -> None:
    for module in plain.modules():
        if isinstance(module, Checkpointed):
            module.active = False  # its running statistics move once
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    for mode in (True, False):
        assert_same(step(fast.train(mode), x), step(plain.train(mode), x))


def test_every_form_is_here():
    assert sorted([*FUSED, *SHARED]) == sorted(FORMS)


@pytest.mark.parametrize("memory", ["balanced", "min", "recompute"])
@pytest.mark.parametrize("form", FUSED)
def test_fused(form, memory):
    plain = of_form(form)
    fast, messages = converted(plain, memory)
    assert (runs(fast), messages) == (["fused"], [])
    assert_same_steps(fast, plain)


@pytest.mark.parametrize("memory", ["min", "recompute"])
@pytest.mark.parametrize("form", SHARED)
def test_on_a_shared_buffer(form, memory):
    plain = of_form(form)
    fast, messages = converted(plain, memory)
    assert (runs(fast), messages) == (["shared buffer"], [])
    assert_same_steps(fast, plain)


@pytest.mark.parametrize("form", SHARED)
def test_balanced_says_why_it_stays_plain_and_what_min_does(form):
    fast, (message,) = converted(of_form(form), "balanced")
    assert runs(fast) == ["plain"] and message.endswith('memory="min" runs it on a shared buffer')
    assert re.search(SHARED[form], message)


@pytest.mark.parametrize("make", [norm_act, post_activation])
def test_growth_rates_of_each_layer(make):
    plain = net(Block(make, growths=GROWTHS))
    fast, (message,) = converted(plain, "balanced")
    assert runs(fast) == ["plain"] and message.endswith('memory="min" runs it on a shared buffer')
    if make is norm_act:
        assert "its layers differ in growth rate" in message
    fast, messages = converted(plain, "min")
    assert (runs(fast), messages) == (["shared buffer"], [])
    assert fastdense.report(fast).rows[0].layers == len(GROWTHS)
    assert_same_steps(fast, plain)


@pytest.mark.parametrize("widths", [[(8, 16), (24, 8)], [(8, 8), (16, 16), (32, 32)]])
def test_modules_that_fit_by_chance_are_no_block(widths):
    """As in a decoder, or in stages that double their channels."""
    chance = nn.Module()
    chance.units = nn.ModuleList(post_activation(*width) for width in widths)
    with pytest.raises(ValueError, match="with none"):
        fastdense.convert(nn.Sequential(chance))


@pytest.mark.parametrize(
    ("form", "growths"),
    [*((form, (K, K)) for form in SHARED), *((form, (K - 1, K + 1)) for form in SHARED if form != "attention")],
)
def test_what_a_shared_buffer_keeps_is_linear_in_depth(form, growths):
    """A layer more keeps what it adds. The plain modules keep what it reads as well, so the square."""
    blocks = [of_form(form, growths * pairs) for pairs in (2, 4, 6)]
    kept = [kept_bytes(converted(block, "min")[0]) for block in blocks]
    assert kept[2] - kept[1] == kept[1] - kept[0] == 4 * K * 100 * 8
    if "reentrant" not in form:
        plainly = [kept_bytes(block) for block in blocks]
        assert plainly[2] - plainly[1] > plainly[1] - plainly[0] > 2 * (kept[1] - kept[0])


@pytest.mark.parametrize("attention", [SqueezeExcite, BlockAttention])
def test_networks_with_attention_keep_a_third(attention):
    torch.manual_seed(0)
    plain = randomise(attentive_net(attention).double())
    fast, messages = converted(plain, "min")
    assert (runs(fast), messages) == (["shared buffer", "shared buffer"], [])
    assert fastdense.report(fast, (3, 32, 32)).kept_ratio <= 0.35
    assert_same_steps(fast, plain)


def kept_bytes(model: nn.Module) -> int:
    return saved_bytes_per_image(model.to("meta"), (3, 10, 10))


def test_a_fused_block_that_was_edited_goes_on_a_shared_buffer_when_converted_again():
    torch.manual_seed(0)
    fast = nn.Sequential(nn.Conv2d(3, C0, 1), fastdense.nn.DenseBlock(3, C0, K, bn_size=2)).double()
    fast[1].denselayer2.norm2 = nn.GroupNorm(2, 2 * K).double()
    plain = fastdense.restore(copy.deepcopy(fast))
    with one_warning("others of each sample"):
        fast(torch.zeros(2, 3, 4, 4, dtype=torch.float64))
    fast[1].load_state_dict(plain[1].state_dict())
    fastdense.convert(fast)
    assert runs(fast) == ["plain"]
    assert runs(fastdense.convert(fast, memory="min")) == ["shared buffer"]
    assert_same_steps(fast, plain)
    fast[1].denselayer2.norm2, plain[1].denselayer2.norm2 = (nn.BatchNorm2d(2 * K).double() for _ in range(2))
    assert runs(fastdense.convert(fast, memory="min")) == ["fused"]
    assert_same_steps(fast, plain)

# SPDX-License-Identifier: Apache-2.0
"""Results have the memory format of plain modules, and nothing is saved for backward twice."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import densenet121
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

import fastdense
from tests.cases.converted import assert_same, fastdense_warnings, step
from tests.cases.families import FAMILIES, MODES, pair
from tests.test_input_classes import saved_bytes


def formats(x: Tensor) -> dict[str, Tensor]:
    """An image batch as programs hand it over."""
    wide = torch.cat([x, x], 1)
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "channels of a wider one": wide[:, : x.shape[1]],
        "channels of a wider channels_last": wide.to(memory_format=torch.channels_last)[:, : x.shape[1]],
        "every other pixel": x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, ::2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


def check_views(made: Tensor, expected: Tensor) -> None:
    """Whoever may call ``view`` on the plain result may do so here."""
    assert not expected.is_contiguous() or made.is_contiguous()
    channels_last = torch.channels_last
    if not expected.is_contiguous():
        assert not expected.is_contiguous(memory_format=channels_last) or made.is_contiguous(
            memory_format=channels_last
        )


@pytest.mark.parametrize(("name", "memory"), MODES)
def test_results_have_the_format_of_plain_ones(name, memory):
    """Networks of this library that go channels-last by themselves do so plainly, too."""
    plain, fast, x = pair(name, memory)
    for given in formats(x).values():
        made, expected = fast(given), plain(given)
        check_views(made, expected)
        torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "memory"), [m for m in MODES if m[0] not in ("RRDBNet", "FC-DenseNet")])
def test_steps_are_the_same_in_every_format(name, memory):
    plain, fast, x = pair(name, memory)
    for given in formats(x).values():
        assert_same(step(fast, given), step(plain, given))


@pytest.mark.parametrize("dims", [1, 3])
def test_signals_and_volumes(dims):
    block = fastdense.nn.DenseBlock(2, 6, 4, spatial_dims=dims).double()
    x = torch.randn(2, 6, *(5, 4, 3)[:dims]).double()
    assert block(x).is_contiguous()
    assert block(x.transpose(1, -1).contiguous().transpose(1, -1)).is_contiguous() == (dims == 1)


@pytest.mark.parametrize("name", ["dense block", "hand-written block", "residual dense block"])
def test_programs_that_view_a_result(name):
    _, fast, x = pair(name, "balanced")
    assert fast(x).view(x.shape[0], -1).shape[0] == x.shape[0]


def test_a_block_by_itself_saves_its_features_once():
    """The contiguous result is what the operator keeps; a transition behind it keeps the same."""
    _, fast, x = pair("dense block and transition", "min")
    block, transition = copy.deepcopy(fast)
    features = block(x).numel() * x.element_size()

    class OneByOne(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return transition(block(x))

    statistics = 1024  # a few numbers a channel
    for given in (x, x.to(memory_format=torch.channels_last)):
        assert features <= saved_bytes(OneByOne(), given) - parameters(fast) <= features + statistics + parameters(fast)


def parameters(net: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in net.parameters())


# --- networks of which others call the parts --------------------------------------------------------------------------

LAYERS = {"denseblock1": "0", "denseblock2": "1", "denseblock3": "2", "norm5": "3"}
PIXELS = 96


def loop(net: nn.Module, x: Tensor) -> Tensor:
    for module in net.features.children():
        x = module(x)
    return x


class Looping(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return loop(self.net, x)


def converted(memory: str) -> nn.Module:
    return fastdense.convert(densenet121(weights=None), memory=memory)


EXTRACTORS = {
    "a new sequence": lambda memory: nn.Sequential(*converted(memory).features.children()),
    "a loop": lambda memory: Looping(converted(memory)),
    "a getter of layers": lambda memory: fastdense.convert(
        IntermediateLayerGetter(densenet121(weights=None).features, LAYERS), memory=memory
    ),
    "a getter of converted layers": lambda memory: IntermediateLayerGetter(converted(memory).features, LAYERS),
}


@pytest.mark.parametrize("memory", ["balanced", "min"])
@pytest.mark.parametrize("name", EXTRACTORS)
def test_parts_called_by_others_save_nothing_twice(name, memory):
    """But for the stem, whose plain modules say once that they save more."""
    x = torch.randn(1, 3, PIXELS, PIXELS)
    with fastdense_warnings() as messages:
        net = EXTRACTORS[name](memory)
        kept = saved_bytes(net, x)
        saved_bytes(net, x)
    assert len(messages) == 1 and "the norm, ReLU and max pool before it" in messages[0]
    stem = 2 * 64 * (PIXELS // 2) ** 2 * 4  # its ReLU's result, and the indices of the pool
    assert kept < 1.03 * saved_bytes(converted(memory).features, x) + stem


@pytest.mark.parametrize("memory", ["balanced", "min"])
def test_converting_what_calls_the_parts_saves_as_little(memory):
    x = torch.randn(1, 3, PIXELS, PIXELS)
    with fastdense_warnings() as messages:
        net = fastdense.convert(nn.Sequential(*densenet121(weights=None).features.children()), memory=memory)
        assert saved_bytes(net, x) <= saved_bytes(converted(memory).features, x)
    assert messages == []


def test_timm_features_only():
    x = torch.randn(1, 3, PIXELS, PIXELS)
    net = fastdense.convert(timm.create_model("densenet121", features_only=True))
    plain = saved_bytes(fastdense.restore(copy.deepcopy(net)), x)
    with fastdense_warnings():
        assert saved_bytes(net, x) < 0.4 * plain


def test_what_fx_makes_of_a_converted_model_says_that_it_is_plain():
    with fastdense_warnings() as messages:
        create_feature_extractor(converted("balanced"), {"features.denseblock2": "a", "features.norm5": "b"})
    assert messages and all("torch.fx" in message for message in messages)


def test_no_warning_where_the_sequence_runs():
    for name in FAMILIES:
        _, fast, x = pair(name, "balanced")
        with fastdense_warnings() as messages:
            fast(x)
        assert messages == [], name

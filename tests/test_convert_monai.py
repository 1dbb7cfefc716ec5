# SPDX-License-Identifier: Apache-2.0
"""convert on MONAI's DenseNets in one to three dimensions: the same numbers, and what stays plain."""

import pytest
import torch
from torch import nn

from tests.cases.converted import FUSED, MEMORY, assert_same, fastdense_warnings, fused_calls, pair, step
from tests.cases.monai import monai_net, volume

pytestmark = pytest.mark.filterwarnings("error:fastdense")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_monai_nets(mode, dims, memory):
    plain, fast = pair(monai_net, memory, dims=dims)
    assert list(plain.state_dict()) == list(fast.state_dict())
    x = volume(dims)
    assert_same(step(getattr(fast, mode)(), x), step(getattr(plain, mode)(), x))
    assert fused_calls(fast, x) == FUSED


@pytest.mark.parametrize("options", [{"norm": ("localresponse", {"size": 3})}, {"act": ("softmax", {"dim": 1})}])
def test_monai_nets_with_another_norm_or_an_unknown_activation_stay_plain(options):
    with fastdense_warnings() as messages:
        plain, fast = pair(monai_net, **options)
        x = volume(3)
        assert_same(step(fast, x), step(plain, x))
    assert len(messages) == 3
    assert fused_calls(fast, x) == []


def test_monai_dropout_of_channels_runs_plain_in_training():
    with fastdense_warnings() as messages:
        _, fast = pair(monai_net, dropout_prob=0.3)
        fast(volume(3))
    assert any("Dropout3d" in message for message in messages)
    assert fused_calls(fast.eval(), volume(3)) == FUSED


def test_monai_dropout_of_a_signal_is_fused():
    _, fast = pair(monai_net, dims=1, dropout_prob=0.3)
    x = volume(1)
    assert fused_calls(fast, x) == FUSED
    assert not torch.equal(fast(x), fast(x))


def test_monai_hooks_are_called():
    plain, fast = pair(monai_net)
    seen = []
    fast.features.denseblock1.denselayer1.layers.conv2.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="hooks"):
        made = step(fast, x := volume(3))
    assert seen
    assert_same(made, step(plain, x))


def test_layers_that_are_no_known_sequence_stay_plain():
    """The order of a sequence is what it computes."""

    def swap(net: nn.Module) -> None:
        layers = net.features.denseblock1.denselayer1.layers
        modules = dict(layers.named_children())
        norm, relu = modules.pop("norm1"), modules.pop("relu1")
        for name in list(layers._modules):
            del layers._modules[name]
        for name, module in {"relu1": relu, "norm1": norm, **modules}.items():
            layers.add_module(name, module)

    with fastdense_warnings() as messages:
        plain, fast = pair(monai_net, change=swap)
    assert any("not a sequence of norm1, relu1" in message for message in messages)
    x = volume(3)
    assert_same(step(fast, x), step(plain, x))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("when", ["before", "after"])
def test_activations_in_place_of_what_others_read_run_plain(when, memory):
    """Without a norm in between they change the features that the block hands on."""

    def change(net: nn.Module) -> None:
        for layer in net.features.denseblock1.children():
            layer.layers.norm1, layer.layers.relu1 = nn.Identity(), nn.LeakyReLU(0.1, inplace=True)

    with fastdense_warnings() as messages:
        plain, fast = pair(monai_net, memory, change=change, when=when)
        x = volume(3)
        for mode in ("train", "eval"):
            assert_same(step(getattr(fast, mode)(), x), step(getattr(plain, mode)(), x))
    assert any("layers.relu1 works in place behind an Identity" in message for message in messages)
    assert fused_calls(fast, x) == [(0, "transition"), *FUSED[1:]]


def test_an_unused_dropout_in_a_layer_is_not_taken_for_its_own():
    import torchvision.models.densenet as tv_densenet

    import fastdense

    net = tv_densenet.DenseNet(4, (1, 1), 8, num_classes=3)
    net.features.denseblock1.denselayer1.dropout = nn.Dropout(0.9)
    with pytest.warns(UserWarning, match="unknown sub-modules"):
        fastdense.convert(net)

# SPDX-License-Identifier: Apache-2.0
"""convert on dense blocks with other activations than ReLU, and with biases: the same numbers, and what stays plain."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdense
from fastdense.models import densenet121, densenet_cifar
from fastdense.nn import DenseBlock, DenseFeatures, Transition
from fastdense.plain.activation import make_activation
from tests.cases.converted import (
    BLOCK,
    FUSED,
    MEMORY,
    assert_same,
    fastdense_warnings,
    fused_calls,
    images,
    one_warning,
    pair,
    randomise,
    step,
    timm_net,
    torchvision_net,
)
from tests.cases.dense_layouts import Layer, SequenceLayer, plain_sequence
from tests.cases.monai import monai_net, volume

pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]

ACTS = ["prelu", "elu", ("leakyrelu", {"negative_slope": 0.1}), "gelu", "swish", "memswish", "mish", "selu", "tanh"]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("act", ACTS, ids=str)
def test_monai_nets(act, memory):
    plain, fast = pair(monai_net, memory, act=act)
    x = volume(3)
    for mode in ("train", "eval"):
        assert_same(step(getattr(fast, mode)(), x), step(getattr(plain, mode)(), x))
    assert fused_calls(fast, x) == FUSED


@pytest.mark.parametrize("dims", [1, 2])
def test_monai_nets_of_other_dimensions(dims):
    plain, fast = pair(monai_net, dims=dims, act="prelu")
    x = volume(dims)
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == FUSED


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "prelu", "leaky_relu", "hard_swish", "tanh", "sigmoid"])
def test_timm_nets(act, memory):
    plain, fast = pair(timm_net, memory, act_layer=act)
    x = images()
    for mode in ("train", "eval"):
        assert_same(step(getattr(fast, mode)(), x), step(getattr(plain, mode)(), x))
    assert fused_calls(fast, x) == [(2, "transition"), (3, "norm_relu")]


def test_an_activation_of_timm_that_is_not_known_stays_plain():
    with fastdense_warnings() as messages:
        plain, fast = pair(timm_net, act_layer="hard_mish")
    assert len(messages) == 3
    assert all("HardMish" in m and "which is no activation that the operator runs" in m for m in messages)
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == []


def with_activations(net: nn.Module, make=nn.PReLU) -> None:
    """Another in the place of every ReLU, of one parameter or of one a channel in turn."""
    count = 0
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU) and hasattr(module, name.replace("relu", "norm")):
                channels = getattr(module, name.replace("relu", "norm")).num_features
                setattr(module, name, make(channels if count % 2 else 1).double())
                count += 1


def with_biases(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.randn(module.out_channels).double())


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("when", ["before", "after"])
def test_torchvision_nets_with_prelu_and_biases(memory, when):
    def change(net):
        with_activations(net)
        with_biases(net)

    plain, fast = pair(torchvision_net, memory, change=change, when=when)
    assert list(plain.state_dict()) == list(fast.state_dict())
    x = images()
    for mode in ("train", "eval"):
        assert_same(step(getattr(fast, mode)(), x), step(getattr(plain, mode)(), x))
    assert fused_calls(fast, x) == FUSED


def test_one_activation_module_of_all_layers_gets_the_sum_of_gradients():
    shared = []

    def change(net):
        act = nn.PReLU().double()
        shared.append(act)
        with_activations(net, lambda channels: act)

    plain, fast = pair(change=change)
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == FUSED
    assert shared[1].weight.grad is not None


def test_activations_are_read_again_when_they_change():
    plain, fast = pair(change=functools.partial(with_activations, make=lambda channels: nn.LeakyReLU(0.1)))
    x = images()
    assert_same(step(fast, x), step(plain, x))
    for net in (plain, fast):
        net.features.denseblock1.denselayer1.relu1.negative_slope = 0.3
        net.features.denseblock2.denselayer2.relu2 = nn.Mish()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == FUSED


def test_hooks_on_an_activation_are_called():
    plain, fast = pair(change=functools.partial(with_activations, make=lambda channels: nn.SiLU()))
    seen = []
    fast.features.denseblock1.denselayer1.relu1.register_forward_hook(lambda *_: seen.append(1))
    x = images()
    with one_warning(BLOCK, "denselayer1.relu1 has hooks", "runs as plain modules"):
        made = step(fast, x)
    assert seen
    assert_same(made, step(plain, x))


def test_a_replaced_function_of_an_activation_is_called(monkeypatch):
    plain, fast = pair(change=functools.partial(with_activations, make=lambda channels: nn.SiLU()))
    x = images()
    monkeypatch.setattr(F, "silu", lambda x, inplace=False: x * 2)
    with fastdense_warnings() as messages:
        made = step(fast, x)
    # The sequence runs plain as well, its stem included, which the first block says.
    known = ("silu has been replaced", "is called by itself, and so are the norm, ReLU and max pool")
    assert any(known[0] in message for message in messages)
    assert all(any(words in message for words in known) for message in messages)
    assert_same(made, step(plain, x))


@pytest.mark.parametrize(("drop", "frozen"), [(0.0, False), (0.2, False), (0.0, True)])
def test_low_precision_and_autocast_run_fused(drop, frozen):
    _, fast = pair(
        torchvision_net, change=functools.partial(with_activations, make=lambda c: nn.GELU()), drop_rate=drop
    )
    fast = fast.float().train(not frozen)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(fused_calls(fast, images().float())) == 2


class FunctionLayer(Layer):
    """Calls a function of the class."""

    function = staticmethod(F.silu)

    def forward(self, x):
        return self.join(x, self.conv2(self.function(self.bn2(self.conv1(self.function(self.bn1(x)))))))


class LeakyLayer(FunctionLayer):
    def function(self, x):
        return F.leaky_relu(x, 0.2)


class SharedLayer(Layer):
    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.PReLU()

    def forward(self, x):
        return self.join(x, self.conv2(self.act(self.bn2(self.conv1(self.act(self.bn1(x)))))))


class BiasedLayer(SequenceLayer):
    def __init__(self, channels):
        super().__init__(channels)
        self[1], self[4] = nn.GELU(), nn.Softplus(2.0)
        for at in (2, 5):
            self[at].bias = nn.Parameter(torch.randn(self[at].out_channels))


@pytest.mark.parametrize("layer", [FunctionLayer, LeakyLayer, SharedLayer, BiasedLayer])
def test_layers_as_people_write_them(layer):
    nets = []
    for convert in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 1), randomise(plain_sequence(3, layer))).double()
        nets.append(fastdense.convert(net) if convert else net)
    plain, fast = nets
    x = torch.randn(2, 3, 13, 11, dtype=torch.float64)
    for mode in ("train", "eval"):
        assert_same(step(getattr(fast, mode)(), x), step(getattr(plain, mode)(), x))
    assert fused_calls(fast, x) == [(3, "none")]


class LimitedLayer(FunctionLayer):
    function = staticmethod(F.relu6)


class ClampedLayer(FunctionLayer):
    function = staticmethod(lambda x: x.clamp(0, 6))


@pytest.mark.parametrize("layer", [LimitedLayer, ClampedLayer])
def test_functions_that_are_relu_of_small_numbers(layer):
    plain = randomise(plain_sequence(3, layer)).double()
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.mul_(20)
    plain = nn.Sequential(nn.Conv2d(3, 6, 1), plain).double()
    fast = fastdense.convert(copy.deepcopy(plain))
    x = torch.randn(2, 3, 13, 11, dtype=torch.float64)
    for mode in ("train", "eval"):
        assert_same(step(getattr(fast, mode)(), x), step(getattr(plain, mode)(), x))
    assert fused_calls(fast, x) == [(3, "none")]


def plain_twin(module: nn.Module) -> nn.Module:
    return fastdense.restore(copy.deepcopy(module))


@pytest.mark.parametrize("act", ["gelu", "prelu", ("elu", {"alpha": 0.5})], ids=str)
def test_blocks_of_this_library(act):
    block = DenseBlock(3, 8, 4, bn_size=2, act=act)
    fast = randomise(DenseFeatures(block, Transition(block.out_channels, 6, act=act))).double()
    plain = plain_twin(fast)
    x = torch.randn(2, 8, 12, 10, dtype=torch.float64)
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == [(3, "transition")]


@pytest.mark.parametrize("act", ["gelu", "prelu"])
def test_models_of_this_library(act):
    fast = densenet_cifar(22, 6, act=act).double()
    plain = plain_twin(fast)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == [(3, "transition"), (3, "transition"), (3, "norm")]
    names = {type(module).__name__ for module in densenet121(act=act).modules()}
    assert type(make_activation("", act)).__name__ in names and "ReLU" not in names


def test_activations_by_name():
    assert make_activation("", "Swish").__class__ is nn.SiLU
    assert make_activation("", ("leaky_relu", {"negative_slope": 0.3})).negative_slope == 0.3
    with pytest.raises(ValueError, match=r"DenseLayer: expected act to be one of relu, .*, got 'rulu'"):
        DenseBlock(2, 6, 4, act="rulu")
    with pytest.raises(ValueError, match=r"Transition: expected act to have arguments of gelu, got \{'slope': 1\}"):
        Transition(6, 4, act=("gelu", {"slope": 1}))
    for act in (nn.GELU, nn.GELU(), ("leaky_relu", 0.1), None):
        with pytest.raises(
            ValueError, match="DenseLayer: expected act to be a name, or a name and a dict of arguments"
        ):
            DenseBlock(2, 6, 4, act=act)


def test_compiled_nets_run_fused():
    plain, fast = pair(torchvision_net, change=with_activations)
    x = images()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert_same(step(fast, x, run=compiled), step(plain, x))

# SPDX-License-Identifier: Apache-2.0
"""convert on dense blocks with instance and group norms, or none: the same numbers, and what stays plain."""

import copy
from functools import partial
from math import gcd

import pytest
import torch
from torch import nn

import fastdense
from fastdense.models import densenet121, densenet_cifar
from fastdense.nn import DenseBlock, DenseFeatures, Transition
from fastdense.plain.norm import make_norm
from tests.cases.converted import (
    BLOCK,
    FUSED,
    MEMORY,
    TRANSITION,
    assert_same,
    fastdense_warnings,
    first_layer,
    fused_calls,
    images,
    one_warning,
    pair,
    randomise,
    step,
    torchvision_net,
)
from tests.cases.dense_layouts import NewestFirstLayer, SequenceLayer, plain_sequence
from tests.cases.monai import monai_net, volume

pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]

NORMS = ["instance", ("instance", {"affine": True}), ("group", {"num_groups": 2}), ("group", {"num_groups": 1})]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("act", ["relu", ("leakyrelu", {"negative_slope": 0.1}), "gelu", "prelu"], ids=str)
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_monai_nets(norm, act, memory):
    plain, fast = pair(monai_net, memory, norm=norm, act=act)
    x = volume(3)
    for mode in ("train", "eval"):
        assert_same(step(getattr(fast, mode)(), x), step(getattr(plain, mode)(), x))
    assert fused_calls(fast, x) == FUSED


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_monai_nets_of_other_dimensions(norm, dims):
    plain, fast = pair(monai_net, dims=dims, norm=norm)
    x = volume(dims)
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == FUSED


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_running_statistics_of_instance_norms(momentum):
    """In training they move as torch's do, in eval mode they normalise."""
    norm = ("instance", {"affine": True, "track_running_stats": True, "momentum": momentum})
    plain, fast = pair(monai_net, norm=norm)
    x = volume(3)
    for mode in ("train", "train", "eval", "train", "eval"):
        assert_same(step(getattr(fast, mode)(), x), step(getattr(plain, mode)(), x))
    assert fused_calls(fast, x) == FUSED
    moved = fast.features.denseblock1.denselayer1.layers.norm1
    assert moved.num_batches_tracked == 0


def with_norms(net: nn.Module, make) -> None:
    """Another in the place of every batch norm of blocks, transitions and the end."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d) and name != "norm0":
                setattr(module, name, randomise(make(child.num_features)).double())


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(gcd(channels, 4), channels)


MAKERS = {
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "tracked instance": lambda channels: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True),
    "group": group_norm,
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_torchvision_nets(make, when, memory):
    plain, fast = pair(torchvision_net, memory, change=partial(with_norms, make=make), when=when)
    assert list(plain.state_dict()) == list(fast.state_dict())
    x = images()
    for mode in ("train", "eval"):
        assert_same(step(getattr(fast, mode)(), x), step(getattr(plain, mode)(), x))
    assert fused_calls(fast, x) == FUSED


def test_norms_are_read_again_when_they_change():
    plain, fast = pair(change=partial(with_norms, make=group_norm))
    x = images()
    assert_same(step(fast, x), step(plain, x))
    for net in (plain, fast):
        first_layer(net).norm1.num_groups = 1
        net.features.denseblock1.denselayer2.norm2.eps = 0.1
        net.features.denseblock2.denselayer1.norm1.weight = None
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == FUSED


def test_no_norms():
    def change(net):
        for name in ("norm1", "norm2"):
            setattr(first_layer(net), name, nn.Identity())
        net.features.transition1.norm = nn.Identity()

    for when in ("before", "after"):
        plain, fast = pair(change=change, when=when)
        x = images()
        assert_same(step(fast, x), step(plain, x))
        assert fused_calls(fast, x) == FUSED


class Skipping(nn.Module):
    """Reads what the transition reads as well."""

    def __init__(self):
        super().__init__()
        self.transition = Transition(8, 4)
        self.transition.norm, self.transition.relu = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        x = x * 1
        return torch.cat([self.transition(x).flatten(1), x.flatten(1)], 1)


def test_transitions_in_place_of_what_others_read():
    fast = Skipping().double()
    plain = fastdense.restore(copy.deepcopy(fast))
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    with one_warning("Transition runs as plain modules: relu works in place behind an Identity"):
        assert_same(step(fast, x), step(plain, x))


def test_instance_norms_beside_none():
    def change(net):
        with_norms(net, MAKERS["instance"])
        first_layer(net).norm2 = nn.Identity()

    plain, fast = pair(change=change)
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == FUSED


def test_norms_of_both_kinds_stay_plain():
    with one_warning(BLOCK, "some of its norms take statistics of the batch, others of each sample"):
        plain, fast = pair(change=lambda net: setattr(first_layer(net), "norm2", group_norm(24).double()), when="after")
        x = images()
        assert_same(step(fast, x), step(plain, x))


@pytest.mark.parametrize("memory", ["min", "recompute"])
def test_norms_of_both_kinds_run_on_a_shared_buffer(memory):
    def change(net):
        first_layer(net).norm2 = randomise(group_norm(24).double())

    plain, fast = pair(memory=memory, change=change)
    kinds = {row.name: row.runs for row in fastdense.report(fast).rows}
    assert kinds == {BLOCK: "shared buffer", TRANSITION: "fused", "features.denseblock2": "fused"}
    x = images()
    for mode in ("train", "eval"):
        assert_same(step(getattr(fast, mode)(), x), step(getattr(plain, mode)(), x))


def test_frozen_batch_norms_beside_group_norms_are_fused():
    def change(net):
        first_layer(net).norm2 = group_norm(first_layer(net).norm2.num_features).double()
        net.eval()

    plain, fast = pair(change=change)
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == FUSED
    with one_warning(BLOCK, "others of each sample"):
        assert_same(step(fast.train(), x), step(plain.train(), x))


@pytest.mark.parametrize("kind", ["instance", "group"])
def test_one_value_of_a_statistic_raises_as_torch_does(kind):
    make = (lambda c: nn.InstanceNorm2d(c)) if kind == "instance" else (lambda c: nn.GroupNorm(c, c))
    for convert in (False, True):
        net = plain_sequence(2, partial(NormLayer, make))
        net = fastdense.convert(net) if convert else net
        with fastdense_warnings(), pytest.raises(ValueError, match="more than 1"):
            net(torch.randn(1, 6, 1, 1))


def test_an_empty_batch_does_what_plain_modules_do():
    plain, fast = pair(change=partial(with_norms, make=group_norm))
    x = images()[:0]
    with fastdense_warnings():
        assert fast(x).shape == plain(x).shape


def of_another_size(net):
    """Torch runs it, with a warning, as it has neither weights nor statistics."""
    with_norms(net, nn.InstanceNorm2d)
    first_layer(net).norm2 = nn.InstanceNorm2d(3)
    net.features.transition1.norm = nn.InstanceNorm2d(2)


def of_another_size_at_the_end(net):
    with_norms(net, nn.InstanceNorm2d)
    net.features.norm5 = nn.InstanceNorm2d(2)


@pytest.mark.filterwarnings("ignore:input's size at dim=1 does not match num_features")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_another_size, ["norm2 has num_features 3, and reads 24 channels", "norm has num_features 2, and reads 20"]),
        (of_another_size_at_the_end, []),
    ],
)
def test_instance_norms_of_another_size(change, said):
    plain, fast = pair(change=change, when="after")
    x = images()
    with fastdense_warnings() as messages:
        for mode in ("train", "eval"):
            assert_same(step(getattr(fast, mode)(), x), step(getattr(plain, mode)(), x))
    assert len(messages) >= len(said) and all(any(words in message for message in messages) for words in said)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda layer: setattr(layer, "norm1", nn.BatchNorm1d(8).double()), "expected 2D or 3D input"),
        (lambda layer: setattr(layer, "norm2", nn.BatchNorm3d(24).double()), "expected 5D input"),
        (lambda layer: setattr(layer, "norm2", nn.InstanceNorm1d(24)), "expected 2D or 3D input"),
        (lambda layer: setattr(layer.norm1, "eps", 0.0), "eps must be positive"),
        (lambda layer: setattr(layer.norm2, "eps", -1e-5), "eps must be positive"),
    ],
)
def test_what_torch_refuses_is_refused(change, error):
    for net in pair(change=lambda net: change(first_layer(net)), when="after"):
        with fastdense_warnings(), pytest.raises(ValueError, match=error):
            net(images())


class NormLayer(SequenceLayer):
    def __init__(self, make, channels):
        super().__init__(channels)
        self[0], self[3] = make(channels), make(self[3].num_features)


class FirstNormLayer(NewestFirstLayer):
    def __init__(self, make, channels):
        super().__init__(channels)
        self.bn1, self.bn2 = make(channels), make(self.bn2.num_features)


def one_group(channels: int) -> nn.Module:
    return nn.GroupNorm(1, channels)


@pytest.mark.parametrize("layer", [NormLayer, FirstNormLayer])
@pytest.mark.parametrize("make", [*MAKERS.values(), one_group], ids=[*MAKERS, "one group"])
def test_layers_as_people_write_them(make, layer):
    nets = []
    for convert in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 1), randomise(plain_sequence(3, partial(layer, make)))).double()
        with fastdense_warnings() as messages:
            nets.append(fastdense.convert(net) if convert else net)
    plain, fast = nets
    x = torch.randn(2, 3, 13, 11, dtype=torch.float64)
    for mode in ("train", "eval"):
        with fastdense_warnings() as more:
            assert_same(step(getattr(fast, mode)(), x), step(getattr(plain, mode)(), x))
        messages += more
    calls = fused_calls(fast, x)
    if layer is FirstNormLayer and make is group_norm:
        assert calls == [] and any("puts new features in front" in message for message in messages)
    else:
        assert calls == [(3, "none")] and messages == []


def plain_twin(module: nn.Module) -> nn.Module:
    return fastdense.restore(copy.deepcopy(module))


OWN = ["instance", ("instance", {"affine": True, "track_running_stats": True}), "group", ("group", {"num_groups": 2})]


@pytest.mark.parametrize("memory", ["balanced", "min"])
@pytest.mark.parametrize("norm", OWN, ids=str)
def test_blocks_of_this_library(norm, memory):
    block = DenseBlock(3, 8, 4, bn_size=2, norm=norm, act="gelu", memory=memory)
    fast = randomise(DenseFeatures(block, Transition(block.out_channels, 6, norm=norm))).double()
    plain = plain_twin(fast)
    x = torch.randn(2, 8, 12, 10, dtype=torch.float64)
    for mode in ("train", "eval"):
        assert_same(step(getattr(fast, mode)(), x), step(getattr(plain, mode)(), x))
    assert fused_calls(fast, x) == [(3, "transition")]


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_models_of_this_library(norm):
    fast = densenet_cifar(22, 6, norm=norm, act="gelu").double()
    plain = plain_twin(fast)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == [(3, "transition"), (3, "transition"), (3, "norm")]


def test_no_batch_norm_is_left_in_a_model():
    for norm, kind in (("instance", nn.InstanceNorm2d), (("group", {"num_groups": 8}), nn.GroupNorm)):
        found = [module for module in densenet121(norm=norm).modules() if "Norm" in type(module).__name__]
        assert len(found) == 121 and {type(module) for module in found} == {kind}
    assert isinstance(densenet121(norm="group", spatial_dims=3).features.norm0, nn.GroupNorm)


def test_norms_by_name():
    assert make_norm("", "Group", 48, 2).num_groups == 16
    assert make_norm("", ("group", {"num_groups": 8}), 48, 2).num_groups == 8
    assert make_norm("", "batch", 4, 3, eps=0.1, momentum=0.2).momentum == 0.2
    assert make_norm("", "instance", 4, 1, eps=0.1, momentum=0.2).eps == 0.1
    with pytest.raises(ValueError, match=r"DenseLayer: expected norm to be one of batch, instance, group, got 'layer'"):
        DenseBlock(2, 6, 4, norm="layer")
    with pytest.raises(ValueError, match=r"Transition: expected norm to have arguments of group, got \{'slope': 1\}"):
        Transition(6, 4, norm=("group", {"slope": 1}))
    for norm in (nn.BatchNorm2d, ("group", 8), 8):
        with pytest.raises(ValueError, match="DenseLayer: expected norm to be a name, or a name and a dict of argum"):
            DenseBlock(2, 6, 4, norm=norm)
    with pytest.raises(ValueError, match="num_channels"):
        DenseBlock(2, 6, 4, norm=("group", {"num_groups": 4}))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_compiled_nets_run_fused(make):
    plain, fast = pair(torchvision_net, change=partial(with_norms, make=make))
    x = images()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert_same(step(fast, x, run=compiled), step(plain, x))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_autocast_runs_fused(make):
    _, fast = pair(torchvision_net, change=partial(with_norms, make=make))
    with torch.autocast("cpu", torch.bfloat16):
        assert len(fused_calls(fast.float(), images().float())) == 2

# SPDX-License-Identifier: Apache-2.0
"""Hooks, and what else cannot be fused: such modules run plainly, with the same numbers and a warning."""

from functools import partial

import pytest
import timm.layers
import torch
import torchvision.models.densenet as tv_densenet
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastdense
from tests.cases.converted import (
    BLOCK,
    FUSED,
    TRANSITION,
    assert_same,
    fastdense_warnings,
    first_layer,
    fused_calls,
    images,
    one_warning,
    pair,
    step,
    timm_net,
    torchvision_net,
)

# A block that falls back where the test does not expect it fails the test.
pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]


# --- hooks ----------------------------------------------------------------------------------------------


def forward_hook(module, log):
    return module.register_forward_hook(lambda m, args, out: log.append(out.shape))


def forward_pre_hook(module, log):
    return module.register_forward_pre_hook(lambda m, args: log.append(len(args)))


def full_backward_hook(module, log):
    return module.register_full_backward_hook(lambda m, grad_in, grad_out: log.append(grad_out[0].shape))


def full_backward_pre_hook(module, log):
    return module.register_full_backward_pre_hook(lambda m, grad_out: log.append(grad_out[0].shape))


HOOKS = [forward_hook, forward_pre_hook, full_backward_hook, full_backward_pre_hook]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # a layer's input is a list
@pytest.mark.parametrize(
    ("inner", "register"),
    [(inner, register) for inner in ("denselayer2", "denselayer1.conv1") for register in HOOKS]
    # torch forbids backward hooks in front of in-place modules
    + [(inner, register) for inner in ("denselayer2.norm1", "denselayer1.relu2") for register in HOOKS[:2]],
)
def test_a_hook_inside_a_block_is_called_and_the_block_runs_plain(inner, register):
    plain, fast = pair()
    x = images()
    logs = [], []
    handles = [
        register(net.features.denseblock1.get_submodule(inner), log)
        for net, log in zip((plain, fast), logs, strict=True)
    ]
    with one_warning("features.denseblock1", f"{inner} has hooks"):
        actual = step(fast, x)
        again = step(fast.eval(), x)
    assert_same(actual, step(plain, x))
    assert_same(again, step(plain.eval(), x))
    assert logs[0] == logs[1] and len(logs[0]) == 2
    with fastdense_warnings() as messages:
        assert fused_calls(fast, x) == [(0, "transition"), FUSED[1]]
    assert messages == []
    handles[1].remove()
    assert fused_calls(fast, x) == FUSED


@pytest.mark.parametrize("register", HOOKS)
def test_a_hook_inside_a_transition_is_called_and_the_transition_runs_plain(register):
    plain, fast = pair()
    x = images()
    logs = [], []
    handles = [register(net.features.transition1.conv, log) for net, log in zip((plain, fast), logs, strict=True)]
    with one_warning("features.transition1", "conv has hooks"):
        actual = step(fast, x)
    assert_same(actual, step(plain, x))
    assert logs[0] == logs[1] != []
    with fastdense_warnings():
        assert fused_calls(fast, x) == [(2, "none"), FUSED[1]]
    handles[1].remove()
    assert fused_calls(fast, x) == FUSED


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("name", ["denseblock1", "transition1", "norm5"])
def test_a_hook_on_a_fused_module_itself_is_called_without_a_warning(name, register):
    plain, fast = pair()
    x = images()
    logs = [], []
    handles = [register(getattr(net.features, name), log) for net, log in zip((plain, fast), logs, strict=True)]
    # Not the whole net: torch forbids backward hooks on norm5 in front of its in-place ReLU.
    assert_same(step(fast.features, x), step(plain.features, x))
    assert logs[0] == logs[1] and len(logs[0]) == 1
    split = {"norm5": [(2, "transition"), (3, "none")]}
    assert fused_calls(fast.features, x) == split.get(name, [(2, "none"), (0, "transition"), (3, "norm")])
    handles[1].remove()
    assert fused_calls(fast, x) == FUSED


def test_a_hook_that_changes_the_output_takes_effect():
    plain, fast = pair()
    for net in (plain, fast):
        net.features.denseblock2.register_forward_hook(lambda m, args, out: out * 2)
        first_layer(net).register_forward_hook(lambda m, args, out: out.abs())
    x = images()
    with one_warning("features.denseblock1", "denselayer1 has hooks"):
        assert_same(step(fast, x), step(plain, x))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # a layer's input is a list
@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_global_hooks_see_every_module(register):
    plain, fast = pair()
    for net in (plain, fast):  # torch forbids backward hooks on in-place modules
        for module in net.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
    x = images()
    seen: list[str] = []
    names = {id(m): name for net in (plain, fast) for name, m in net.named_modules()}
    handle = register(lambda module, *_: seen.append(names[id(module)]))
    try:
        with fastdense_warnings() as messages:
            actual = step(fast.features, x)
        fast_seen = seen[:]
        seen.clear()
        expected = step(plain.features, x)
    finally:
        handle.remove()
    assert sorted(fast_seen) == sorted(seen)
    assert_same(actual, expected)
    assert len(messages) == 3 and all("global module hooks" in message for message in messages)
    assert fused_calls(fast, x) == FUSED


def test_a_forward_set_on_an_instance_is_called():
    def change(net):
        for module in (net.features.denseblock2, first_layer(net)):
            forward = module.forward
            module.forward = lambda x, forward=forward: forward(x).abs()

    plain, fast = pair(change=change, when="after")
    x = images()
    with one_warning("features.denseblock1", "denselayer1", "forward of its own"):
        assert_same(step(fast, x), step(plain, x))


# --- what cannot be fused -------------------------------------------------------------------------------


class FoldedConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).abs()


class FoldedLayer(tv_densenet._DenseLayer):
    def forward(self, x):
        return super().forward(x).abs()


class FoldedBottleneck(tv_densenet._DenseLayer):
    def bn_function(self, inputs):
        return super().bn_function(inputs).abs()


def set_conv1(net, make=nn.Conv2d, **options):
    old = first_layer(net).conv1
    options = {"kernel_size": 1, "bias": False} | options
    first_layer(net).conv1 = make(old.in_channels, old.out_channels, **options).double()


def set_conv2(net, **options):
    old = first_layer(net).conv2
    options = {"kernel_size": 3, "padding": 1, "bias": False} | options
    first_layer(net).conv2 = nn.Conv2d(old.in_channels, old.out_channels, **options).double()


def set_norm(net, make):
    first_layer(net).norm2 = make(first_layer(net).norm2.num_features).double()


def set_layer(net, make):
    old = first_layer(net)
    layer = make(old.norm1.num_features, 6, 4, 0.0).double()
    layer.load_state_dict(old.state_dict())
    net.features.denseblock1.denselayer1 = layer


def set_wider_first_layer(net):
    block = net.features.denseblock1
    block.denselayer1.conv2 = nn.Conv2d(24, 8, 3, padding=1, bias=False).double()
    block.denselayer2.norm1 = nn.BatchNorm2d(8 + 8).double()
    block.denselayer2.conv1 = nn.Conv2d(8 + 8, 24, 1, bias=False).double()
    transition = net.features.transition1
    transition.norm = nn.BatchNorm2d(8 + 8 + 6).double()
    transition.conv = nn.Conv2d(8 + 8 + 6, transition.conv.out_channels, 1, bias=False).double()


def set_wider_bottleneck(net):
    layer = first_layer(net)
    layer.conv1, layer.norm2 = nn.Conv2d(8, 10, 1, bias=False).double(), nn.BatchNorm2d(10).double()
    layer.conv2 = nn.Conv2d(10, 6, 3, padding=1, bias=False).double()


CHANGES = {
    "weight norm": (lambda n: parametrizations.weight_norm(first_layer(n).conv1), BLOCK, "denselayer1.conv1 is a"),
    "old weight norm": (lambda n: nn.utils.weight_norm(first_layer(n).conv2), BLOCK, "denselayer1.conv2 has hooks"),
    "spectral norm": (lambda n: parametrizations.spectral_norm(first_layer(n).conv2), BLOCK, "denselayer1.conv2 is a"),
    "old spectral norm": (lambda n: nn.utils.spectral_norm(first_layer(n).conv1), BLOCK, "denselayer1.conv1 has hooks"),
    "pruned": (lambda n: prune.l1_unstructured(first_layer(n).conv2, "weight", 0.5), BLOCK, "denselayer1.conv2 has"),
    "conv subclass": (lambda n: set_conv1(n, FoldedConv), BLOCK, "denselayer1.conv1 is a FoldedConv"),
    "circular padding": (lambda n: set_conv1(n, bias=True, padding_mode="circular"), BLOCK, "expected stride 1"),
    "grouped conv": (lambda n: set_conv2(n, groups=2), BLOCK, "groups 1"),
    "dilated conv": (lambda n: set_conv2(n, dilation=2, padding="same"), BLOCK, "denselayer1.conv2 is Conv2d"),
    "reflected padding": (lambda n: set_conv2(n, padding_mode="reflect"), BLOCK, "'same' zero padding"),
    "group norm": (lambda n: set_norm(n, partial(nn.GroupNorm, 2)), BLOCK, "some of its norms take statistics of the"),
    "local norm": (lambda n: set_norm(n, nn.LocalResponseNorm), BLOCK, "denselayer1.norm2 is a LocalResponseNorm"),
    "softmax": (lambda n: setattr(first_layer(n), "relu1", nn.Softmax(1)), BLOCK, "relu1 is a Softmax"),
    "odd celu": (lambda n: setattr(first_layer(n), "relu2", nn.CELU(-1.0)), BLOCK, "alpha that is not above 0"),
    "one dropout": (lambda n: setattr(first_layer(n), "drop_rate", 1.0), BLOCK, "its layers differ in"),
    "extra module": (lambda n: setattr(first_layer(n), "gate", nn.ReLU()), BLOCK, "unknown sub-modules ['gate']"),
    "layer subclass": (lambda n: set_layer(n, FoldedLayer), BLOCK, "denselayer1 is a FoldedLayer"),
    "bottleneck of a subclass": (lambda n: set_layer(n, FoldedBottleneck), BLOCK, "denselayer1 is a FoldedBottleneck"),
    "wider layer": (set_wider_first_layer, BLOCK, "its layers differ in"),
    "wider bottleneck": (set_wider_bottleneck, BLOCK, "its layers differ in"),
    "hard transition": (lambda n: setattr(n.features.transition1, "relu", nn.Hardsigmoid()), TRANSITION, "Hardsigmoid"),
    "max pool": (lambda n: setattr(n.features.transition1, "pool", nn.MaxPool2d(2)), TRANSITION, "pool is a MaxPool2d"),
    "other pool": (
        lambda n: setattr(n.features.transition1, "pool", nn.AvgPool2d(3, 2, 1)),
        TRANSITION,
        "expected kernel and stride 2",
    ),
    "divisor": (
        lambda n: setattr(n.features.transition1, "pool", nn.AvgPool2d(2, 2, divisor_override=3)),
        TRANSITION,
        "divisor_override",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_be_fused_runs_plain_with_a_warning(name, when):
    change, module, reason = CHANGES[name]
    x = images()
    with one_warning(module, reason, "stays plain" if when == "before" else "runs as plain modules"):
        plain, fast = pair(change=change, when=when)
        actual = [step(fast, x), step(fast, x), step(fast.eval(), x)]
    expected = [step(plain, x), step(plain, x), step(plain.eval(), x)]
    for mine, theirs in zip(actual, expected, strict=True):
        assert_same(mine, theirs)
    with fastdense_warnings():
        calls = fused_calls(fast.train(), x)
    assert calls == ([(0, "transition")] if module == BLOCK else [(2, "none")]) + FUSED[1:]


class FoldedBlock(tv_densenet._DenseBlock):
    def forward(self, x):
        return super().forward(x).abs()


def test_a_block_class_with_a_forward_of_its_own_is_left_alone():
    def change(net):
        net.features.denseblock1.__class__ = FoldedBlock

    with one_warning(BLOCK, "its results differ from those of a dense block: norm, activation and convolution"):
        plain, fast = pair(change=change)
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == [(0, "transition"), FUSED[1]]


def test_a_layer_class_that_changes_no_method_is_fused():
    class Layer(tv_densenet._DenseLayer):
        def __init__(self, *args):
            super().__init__(*args)

    plain, fast = pair(change=lambda net: set_layer(net, Layer))
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == FUSED


def test_a_module_added_to_a_transition_after_the_conversion():
    plain, fast = pair(change=lambda net: net.features.transition1.add_module("last", nn.Hardtanh()), when="after")
    x = images()
    with one_warning(TRANSITION, "its modules are norm, relu, conv, pool, last"):
        assert_same(step(fast, x), step(plain, x))


def test_same_padding_and_other_odd_kernels_are_fused():
    def change(net):
        for layer in net.features.denseblock1.children():
            layer.conv2 = nn.Conv2d(24, 6, (5, 1), padding="same", bias=False).double()

    plain, fast = pair(change=change)
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == FUSED


def test_pruning_made_permanent_is_fused_again():
    def change(net):
        prune.l1_unstructured(first_layer(net).conv2, "weight", 0.5)
        prune.remove(first_layer(net).conv2, "weight")

    plain, fast = pair(change=change, when="after")
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == FUSED


@pytest.mark.parametrize("options", [{"act_layer": "hard_sigmoid"}, {"norm_layer": "groupnorm1"}])
def test_timm_nets_with_another_activation_or_norm_stay_plain(options):
    with fastdense_warnings() as messages:
        plain, fast = pair(timm_net, block_config=(1, 1), **options)
        x = images()
        assert_same(step(fast, x), step(plain, x))
    assert [message.split()[1] for message in messages] == [BLOCK, "features.denseblock2", TRANSITION]
    assert fused_calls(fast, x) == []


def test_timm_blur_pool_in_the_stem_is_no_obstacle():
    plain, fast = pair(timm_net, aa_layer=timm.layers.BlurPool2d, stem_type="deep")  # densenetblur121d
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == [(2, "transition"), (3, "norm_relu")]


def test_timm_blur_pool_in_a_transition_stays_plain():
    x = images()
    with one_warning(TRANSITION, "pool is a BlurPool2d"):
        plain, fast = pair(timm_net, aa_layer=timm.layers.BlurPool2d, stem_type="deep", aa_stem_only=False)
        assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == [(2, "none"), (3, "norm_relu")]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("memory", ["balanced", "min"])
def test_scripted_modules_beside_blocks_and_inside(memory):
    def change(net):
        net.features.relu0 = torch.jit.script(nn.Sigmoid())
        net.features.pool0 = nn.Sequential(net.features.pool0, torch.jit.script(nn.Tanh()))
        first_layer(net).relu2 = torch.jit.script(nn.ReLU())

    with one_warning(f"{BLOCK} stays plain: denselayer1.relu2 is a RecursiveScriptModule"):
        plain, fast = pair(memory=memory, change=change)
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == [(0, "transition"), (3, "norm")]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_models_have_no_blocks():
    with pytest.raises(ValueError, match=r"expected model to contain dense, .* got RecursiveScriptModule with none"):
        fastdense.convert(torch.jit.script(torchvision_net()))


@pytest.mark.parametrize("given", [None, [1, 2], 3.0, ()], ids=str)
def test_what_is_no_tensor_raises_as_of_plain_modules(given):
    for net in (torchvision_net(), fastdense.convert(torchvision_net())):
        with fastdense_warnings(), pytest.raises(TypeError, match="expected Tensor as element 0 in argument 0"):
            net.features.denseblock1(given)


def test_warnings_of_convert_point_at_its_caller():
    for change in (CHANGES["softmax"][0], CHANGES["hard transition"][0]):
        net = torchvision_net()
        change(net)
        with pytest.warns(UserWarning, match="stays plain") as caught:
            fastdense.convert(net)
        assert caught[0].filename == __file__

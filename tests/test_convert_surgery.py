# SPDX-License-Identifier: Apache-2.0
"""What other tools put into a converted network: quantisation, pruning, adapters, Grad-CAM, replaced modules.

The blocks concerned run as plain modules with one warning, the numbers are those of the plain network given the same
treatment, and where the tool takes its changes back the network runs fused again.
"""

from collections.abc import Callable

import pytest
import torch
import torch.ao.quantization as quantization
from captum.attr import LayerGradCam
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.ao.quantization import quantize_fx
from torch.nn.utils import parametrizations, parametrize, prune

from tests.cases.converted import (
    BLOCK,
    FUSED,
    TRANSITION,
    assert_bit_equal,
    assert_same,
    fastdense_warnings,
    first_layer,
    fused_calls,
    images,
    one_warning,
    pair,
    step,
)
from tests.cases.random_block import relative

# A block that falls back where the test does not expect it fails the test.
pytestmark = [
    pytest.mark.filterwarnings("error:fastdense"),
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]
EVERY = (BLOCK, TRANSITION, "features.denseblock2")
LAST_BLOCK = "features.denseblock2"


def seeded(run: Callable[..., Tensor], net: nn.Module, *others: object) -> Tensor:
    torch.manual_seed(0)
    return run(net, *others)


# --- quantisation ---------------------------------------------------------------------------------------


def observed(net: nn.Module, x: Tensor) -> Tensor:
    net.eval().qconfig = quantization.get_default_qconfig("fbgemm")
    return quantization.prepare(net)(x)


def quantised(net: nn.Module, x: Tensor) -> Tensor:
    wrapped = quantization.QuantWrapper(net).eval()
    wrapped.qconfig = quantization.get_default_qconfig("fbgemm")
    prepared = quantization.prepare(wrapped)
    prepared(x)
    return quantization.convert(prepared)(x)


def trained_aware(net: nn.Module, x: Tensor) -> Tensor:
    net.train().qconfig = quantization.get_default_qat_qconfig("fbgemm")
    prepared = quantization.prepare_qat(net)
    prepared(x).sum().backward()
    return first_layer(prepared).conv1.weight.grad


@pytest.mark.filterwarnings("ignore:.*(quant|reduce_range|must run observer)")
@pytest.mark.parametrize("run", [observed, quantised, trained_aware])
def test_eager_quantisation_runs_plain(run):
    plain, fast = (net.float() for net in pair())
    x = images().float()
    with fastdense_warnings() as messages:
        made = seeded(run, fast, x)
    assert [message.split()[1].removeprefix("module.") for message in messages[:3]] == list(EVERY)
    assert torch.equal(made, seeded(run, plain, x))


@pytest.mark.filterwarnings("ignore:.*(quant|reduce_range|must run observer|device_type)")
def test_graph_quantisation_records_the_plain_modules():
    x = images().float()
    made = []
    for net in pair():
        mapping = quantization.get_default_qconfig_mapping("fbgemm")
        with fastdense_warnings() as messages:
            prepared = quantize_fx.prepare_fx(net.float().eval(), mapping, (x,))
        assert all("torch.fx" in message for message in messages)
        made.append((prepared(x), quantize_fx.convert_fx(prepared)(x)))
    for mine, theirs in zip(*made, strict=True):
        assert torch.equal(mine, theirs)


def test_dynamic_quantisation_of_the_classifier_leaves_the_blocks_fused():
    plain, fast = (quantization.quantize_dynamic(net.float().eval(), {nn.Linear}) for net in pair())
    x = images().float()
    # Rounding to bytes turns an error of 1e-7 into a step of the scale at worst.
    assert relative(fast(x), plain(x)) <= 1e-2
    assert fused_calls(fast, x) == FUSED


def test_the_reason_names_the_package_of_a_class_of_the_same_name():
    plain, fast = pair()
    x = images()
    for net in (plain, fast):
        first_layer(net).conv1 = OwnConv.Conv2d(8, 24, 1, bias=False).double()
        first_layer(net).conv1.load_state_dict(first_layer(plain).conv1.state_dict())
    with one_warning(BLOCK, f"conv1 is a {__name__}.Conv2d, not a Conv1d"):
        assert_same(step(fast, x), step(plain, x))


class OwnConv:
    class Conv2d(nn.Conv2d):
        pass


# --- taken back again -----------------------------------------------------------------------------------


def conv1(net: nn.Module) -> nn.Module:
    return first_layer(net).conv1


def swap_norm(net: nn.Module, kept: list[nn.Module]) -> None:
    kept.append(first_layer(net).norm2)
    first_layer(net).norm2 = nn.GroupNorm(2, 24).double()


CHANGES = {
    "pruning": (
        lambda net, kept: prune.l1_unstructured(conv1(net), "weight", 0.5),
        lambda net, kept: prune.remove(conv1(net), "weight"),
    ),
    "global pruning": (
        lambda net, kept: prune.global_unstructured(
            [(conv1(net), "weight"), (first_layer(net).conv2, "weight")], prune.L1Unstructured, amount=0.5
        ),
        lambda net, kept: [prune.remove(module, "weight") for module in (conv1(net), first_layer(net).conv2)],
    ),
    "weight norm": (
        lambda net, kept: parametrizations.weight_norm(conv1(net)),
        lambda net, kept: parametrize.remove_parametrizations(conv1(net), "weight"),
    ),
    "spectral norm": (
        lambda net, kept: parametrizations.spectral_norm(conv1(net)),
        lambda net, kept: parametrize.remove_parametrizations(conv1(net), "weight"),
    ),
    "another norm": (swap_norm, lambda net, kept: setattr(first_layer(net), "norm2", kept.pop())),
    "a wrapped layer": (
        lambda net, kept: setattr(net.features.denseblock1, "denselayer1", nn.Sequential(first_layer(net))),
        lambda net, kept: setattr(net.features.denseblock1, "denselayer1", first_layer(net)[0]),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_surgery_runs_plain_and_fused_again_once_taken_back(name):
    change, take_back = CHANGES[name]
    plain, fast = pair()
    x = images()
    kept: tuple[list, list] = ([], [])
    for net, own in zip((plain, fast), kept, strict=True):
        torch.manual_seed(0)
        change(net, own)
    with one_warning(BLOCK):
        for mode in (True, True, False):
            assert_same(step(fast.train(mode), x), step(plain.train(mode), x))
    for net, own in zip((plain, fast), kept, strict=True):
        take_back(net, own)
    assert_same(step(fast.train(), x), step(plain.train(), x))
    assert fused_calls(fast, x) == FUSED


@pytest.mark.parametrize("memory", ["balanced", "recompute"])
def test_sizes_as_one_number_are_those_of_all_axes(memory):
    """As torch takes them, and as people write them into convolutions and pools that exist."""
    plain, fast = pair(memory=memory)
    for net in (plain, fast):
        for module in net.modules():
            names = ("stride", "padding", "dilation", "kernel_size") if isinstance(module, nn.Conv2d) else ()
            for name in names:
                setattr(module, name, getattr(module, name)[0])
        net.features.transition1.pool.stride = (2,)
        net.features.pool0.padding = (1,)
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast.eval(), x) == FUSED
    fast.train()
    for net in (plain, fast):
        first_layer(net).conv2.padding = first_layer(net).conv2.dilation = 2
    with one_warning(BLOCK, "conv2 is Conv2d(kernel_size=3, stride=1, padding=2, dilation=2, groups=1"):
        assert_same(step(fast, x), step(plain, x))


def test_a_frozen_layer_stays_fused():
    plain, fast = pair()
    for net in (plain, fast):
        first_layer(net).requires_grad_(False).eval()
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == FUSED


def test_lora_on_inner_convolutions_trains_the_same_and_merged_is_fused():
    x = images()
    made, merged = [], []
    with one_warning(BLOCK, "denselayer1.conv1 is a peft.", "not a Conv1d"):
        for net in pair():
            torch.manual_seed(0)
            targets = r".*denseblock1\.denselayer1\.conv[12]"
            tuned = get_peft_model(net, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).double()
            made.append(step(tuned, x))
            merged.append(tuned.eval().merge_and_unload())
    assert sum(name.startswith("grad") for name in made[0]) == 4  # two factors for each of two convolutions
    assert_same(made[1], made[0])
    assert fused_calls(merged[1], x) == FUSED
    assert relative(merged[1](x), merged[0](x)) <= 1e-10


# --- attribution ----------------------------------------------------------------------------------------


def grad_cam(net: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's activations, weighted by the mean of the class's gradient; before its ReLU, which may leave nothing."""
    kept: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda m, args, out: kept.update(activation=out)),
        layer.register_full_backward_hook(lambda m, grad_in, grad_out: kept.update(gradient=grad_out[0])),
    ]
    net(x)[:, 1].sum().backward()
    for handle in handles:
        handle.remove()
    return (kept["gradient"].mean((2, 3), keepdim=True) * kept["activation"]).sum(1)


def captum(net: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    return LayerGradCam(net, layer).attribute(x, target=1)


@pytest.mark.parametrize("attribute", [grad_cam, captum])
@pytest.mark.parametrize("name", ["denseblock2.denselayer2.conv2", "denseblock2.denselayer1.conv1"])
def test_attribution_to_an_inner_layer(attribute, name):
    plain, fast = (net.eval() for net in pair())
    x = images()
    wanted = attribute(plain, plain.features.get_submodule(name), x)
    with one_warning(LAST_BLOCK, "has hooks"):
        made = attribute(fast, fast.features.get_submodule(name), x)
    assert wanted.abs().sum() > 0
    assert relative(made, wanted) <= 1e-9
    assert fused_calls(fast, x) == FUSED


@pytest.mark.parametrize("attribute", [grad_cam, captum])
def test_attribution_to_a_block_needs_no_plain_modules(attribute):
    plain, fast = (net.eval() for net in pair())
    x = images()
    wanted, made = (attribute(net, net.features.denseblock2, x) for net in (plain, fast))
    assert wanted.abs().sum() > 0
    assert relative(made, wanted) <= 1e-9


def test_one_warning_over_many_steps():
    _, fast = pair()
    first_layer(fast).register_forward_hook(lambda *_: None)
    x = images()
    with one_warning(BLOCK):
        first = step(fast.eval(), x)
        for _ in range(3):
            assert_bit_equal(step(fast, x), first)

# SPDX-License-Identifier: Apache-2.0
"""Converted networks in training: frozen norms and parameters, dropout, autograd."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch._dynamo.testing
import torchvision.models.densenet as tv_densenet
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdense
from tests.cases.converted import (
    BLOCK,
    FUSED,
    MEMORY,
    Calls,
    assert_bit_equal,
    assert_same,
    fastdense_warnings,
    first_layer,
    fused_calls,
    images,
    norms,
    one_warning,
    pair,
    randomise,
    step,
    timm_net,
)
from tests.cases.random_block import relative

# A block that falls back where the test does not expect it fails the test.
pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]


# --- norms and frozen parts -----------------------------------------------------------------------------


def replace_norms(net: nn.Module, **options) -> None:
    for module in list(net.modules()):
        for name, inner in list(module.named_children()):
            if type(inner) is nn.BatchNorm2d:
                setattr(module, name, nn.BatchNorm2d(inner.num_features, **options).double())
    randomise(net)


def freeze_all_norms(net):
    for norm in norms(net):
        norm.eval()


def freeze_some_norms(net):
    for norm in norms(net)[1::2]:
        norm.eval()


def freeze_one_block(net):
    net.features.denseblock1.eval()


def unequal_eps(net):
    for index, norm in enumerate(norms(net)):
        norm.eps = 1e-5 * 3**index


def unequal_momentum(net):
    for index, norm in enumerate(norms(net)):
        norm.momentum = None if index % 3 == 0 else index / 20


def stop_tracking(net):
    for norm in norms(net)[::2]:
        norm.track_running_stats = False


def only_weights_of_norms(net):
    for norm in norms(net):
        norm.bias = None


NORMS = {
    "all frozen": freeze_all_norms,
    "some frozen": freeze_some_norms,
    "one block frozen": freeze_one_block,
    "momentum None": lambda net: replace_norms(net, momentum=None),
    "unequal momentum": unequal_momentum,
    "not affine": lambda net: replace_norms(net, affine=False),
    "no running statistics": lambda net: replace_norms(net, track_running_stats=False),
    "running statistics no longer tracked": stop_tracking,
    "unequal eps": unequal_eps,
    "no shift": only_weights_of_norms,
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", NORMS)
def test_norms(name, memory):
    plain, fast = pair(memory=memory, change=NORMS[name], when="after")
    x = images()
    for _ in range(2):
        assert_same(step(fast, x), step(plain, x))
    assert_same(step(fast.eval(), x), step(plain.eval(), x))
    assert fused_calls(fast, x) == FUSED


def test_running_statistics_without_a_counter_stay_plain():
    def change(net):
        first_layer(net).norm1.num_batches_tracked = None

    plain, fast = pair(change=change, when="after")
    x = images()
    with one_warning(BLOCK, "denselayer1.norm1 has running statistics without a num_batches_tracked"):
        assert_same(step(fast, x), step(plain, x))


def test_a_counter_without_running_statistics_still_counts():
    def change(net):
        for norm in norms(net):
            norm.running_mean = norm.running_var = None

    plain, fast = pair(change=change, when="after")
    x = images()
    with fastdense_warnings() as messages:
        assert_same(step(fast, x), step(plain, x))
    assert any("norm1 has a num_batches_tracked without running statistics" in message for message in messages)


def freeze(net: nn.Module, frozen) -> None:
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not frozen(name))


@pytest.mark.parametrize(
    "frozen",
    [
        lambda name: True,
        lambda name: "conv" in name,
        lambda name: "norm" in name,
        lambda name: "denselayer1" in name or "transition" in name,
        lambda name: "classifier" not in name,
    ],
    ids=["all", "convolutions", "norms", "first layers and transitions", "all but the classifier"],
)
def test_parameters_without_gradient(frozen):
    plain, fast = pair(change=lambda net: freeze(net, frozen))
    x = images()
    actual = step(fast, x)
    assert_same(actual, step(plain, x))
    assert {name for name in actual if name.startswith("grad")} == {
        f"grad {name}" for name, _ in fast.named_parameters() if not frozen(name)
    }


def test_input_without_gradient():
    plain, fast = pair()
    x = images()
    for net in (plain, fast):
        net(x).square().sum().backward()
    for (name, mine), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert relative(mine.grad, theirs.grad) <= 1e-10, name


# --- dropout --------------------------------------------------------------------------------------------


def dropout_block(drop_rate: float) -> nn.Module:
    return randomise(tv_densenet._DenseBlock(2, 8, 4, 16, drop_rate).double())


def test_dropout_drops_and_scales_as_torch_does():
    rate = 0.3
    plain, fast = pair(dropout_block, drop_rate=rate)
    x = torch.randn(4, 8, 20, 20, dtype=torch.float64)
    plain.denselayer1.drop_rate = 0.0
    kept = plain(x)[:, 8:24] / (1 - rate)
    first = fast(x)[:, 8:24]
    dropped = first == 0
    deviation = (rate * (1 - rate) / first.numel()) ** 0.5
    assert abs(dropped.double().mean() - rate) < 5 * deviation
    per_channel = dropped.double().mean((0, 2, 3))
    assert (per_channel - rate).abs().max() < 5 * deviation * 16**0.5
    assert relative(first, kept.masked_fill(dropped, 0)) <= 1e-10
    second = fast(x)[:, 24:] == 0
    assert abs(second.double().mean() - rate) < 5 * deviation
    both = ((fast(x)[:, 8:24] == 0) & dropped).double().mean()
    assert abs(both - rate**2) < 5 * deviation, "two calls share a mask"


def test_dropout_is_the_identity_in_eval():
    plain, fast = pair(drop_rate=0.5)
    x = images()
    assert_same(step(fast.eval(), x), step(plain.eval(), x))


def test_dropout_follows_the_seed():
    _, fast = pair(drop_rate=0.5)
    x = images()
    made = []
    for seed, memory in ((1, "balanced"), (1, "min"), (2, "balanced")):
        fastdense.convert(fast, memory=memory)
        torch.manual_seed(seed)
        result = step(fast, x)
        made.append({name: value for name, value in result.items() if not name.startswith("buffer")})
    assert_bit_equal(made[0], made[1])
    assert not torch.equal(made[0]["out"], made[2]["out"])


def test_dropout_of_everything():
    plain, fast = pair(drop_rate=1.0)
    x = images()
    assert_same(step(fast, x), step(plain, x))


def test_dropout_is_read_from_timm_nets():
    _, fast = pair(timm_net, proj_drop_rate=0.4)
    blocks = []
    fast.features.denseblock1.register_forward_hook(lambda m, args, out: blocks.append(out[:, 12:]))
    fast(images())
    assert abs((blocks[0] == 0).double().mean() - 0.4) < 0.05


# --- autograd -------------------------------------------------------------------------------------------


def test_gradients_accumulate():
    plain, fast = pair()
    x, y = images(), images()
    for net in (plain, fast):
        step(net, x)
    assert_same(step(fast, y, zero=False), step(plain, y, zero=False))


def test_backward_twice_through_one_graph():
    plain, fast = pair()
    x = images()
    grads = []
    for net in (plain, fast):
        out = net(x)
        out.sum().backward(retain_graph=True)
        out.square().sum().backward()
        grads.append({name: p.grad for name, p in net.named_parameters()})
    assert_same(grads[1], grads[0])


@pytest.mark.parametrize("memory", MEMORY)
def test_two_forwards_before_one_backward(memory):
    plain, fast = pair(memory=memory)
    x, y = images(), images(3)
    made = []
    for net in (plain, fast):
        made.append(step(net, x, run=lambda x, net=net: net(x).sum(0) * net(y).sum(0) + net(x * 2).sum(0)))
    assert_same(made[1], made[0])


@pytest.mark.parametrize("plain_first", [True, False])
def test_a_plain_and_a_fused_forward_before_one_backward(plain_first):
    """Plain batch norms save their running statistics for backward, and fused ones move them meanwhile."""
    plain, fast = pair()
    x, y = images(), images(3)

    def run(net, x):
        made = []
        for is_plain, image in ((plain_first, x), (not plain_first, y)):
            layer = first_layer(net).conv1
            handle = layer.register_forward_hook(lambda *_: None) if is_plain else None
            made.append(net(image).square().sum())
            if handle is not None:
                handle.remove()
        return torch.stack(made)

    expected = step(plain, x, run=partial(run, plain))
    with one_warning("denselayer1.conv1 has hooks"):
        actual = step(fast, x, run=partial(run, fast))
    assert_same(actual, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("memory", MEMORY)
def test_an_outer_checkpoint_changes_nothing_and_counts_once(memory, use_reentrant):
    plain, fast = pair(memory=memory)
    x = images()

    def run(x):
        return fast.classifier(checkpoint(fast.features, x, use_reentrant=use_reentrant).relu().mean((2, 3)))

    actual = step(fast, x, run=run)
    expected = step(plain, x)
    assert actual["buffer features.norm5.num_batches_tracked"] == 1
    # The stem's own norm is plain and counted twice by a checkpoint, as it is without fastdense.
    stem = [name for name in actual if name.startswith("buffer features.norm0")]
    for name in stem:
        del actual[name], expected[name]
    assert_same(actual, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_an_outer_checkpoint_repeats_the_dropout(use_reentrant):
    _, fast = pair(drop_rate=0.5)
    _, twin = pair(drop_rate=0.5)
    x = images()
    torch.manual_seed(7)
    expected = step(fast.features, x)
    torch.manual_seed(7)
    actual = step(twin.features, x, run=partial(checkpoint, twin.features, use_reentrant=use_reentrant))
    grads = [{n: v for n, v in made.items() if not n.startswith("buffer")} for made in (actual, expected)]
    assert_bit_equal(*grads)


def test_inference_mode():
    for training in (True, False):
        plain, fast = pair()
        x = images()
        with torch.inference_mode():
            out, expected = fast.train(training)(x), plain.train(training)(x)
        assert out.is_inference()
        assert relative(out, expected) <= 1e-10
        assert_same(fast.state_dict(), plain.state_dict())
        assert_same(step(fast, x), step(plain, x))


def test_no_grad_keeps_nothing():
    _, fast = pair()
    x = images()
    saved = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t), Calls() as calls:
        out = fast(x)
    assert calls.kept == [0, 0]
    assert saved == [] and out.grad_fn is None


def test_in_place_edit_of_a_block_raises_in_backward():
    _, fast = pair()
    fast.features.denseblock1.register_forward_hook(lambda m, args, out: out.mul_(2))
    with pytest.raises(RuntimeError, match=r"nn.ReLU\(inplace=True\) after it.*modified by an inplace operation"):
        fast.to(memory_format=torch.channels_last)(images()).sum().backward()


def test_in_place_edits_of_the_features_are_allowed():
    plain, fast = pair()
    x = images()
    made = [step(net.features, x, run=lambda x, net=net: net.features(x).mul_(2).relu_()) for net in (fast, plain)]
    assert_same(*made)


def test_double_backward_raises():
    _, fast = pair()
    x = images().requires_grad_()
    (grad,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.square().sum().backward()


def test_two_threads_at_once():
    plain, fast = pair()
    plain.eval()
    fast.eval()
    inputs = [images(2 + index % 3) for index in range(8)]
    expected = [step(copy.deepcopy(plain), x) for x in inputs]

    def run(x):
        net = copy.deepcopy(fast)
        return fast(x).detach(), step(net, x)

    with ThreadPoolExecutor(2) as pool:
        for (out, made), wanted in zip(pool.map(run, inputs), expected, strict=True):
            assert relative(out, wanted["out"]) <= 1e-10
            assert_same(made, wanted)

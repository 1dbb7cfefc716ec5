# SPDX-License-Identifier: Apache-2.0
"""convert and restore on torchvision's and timm's own modules: the same numbers, and what they leave alone."""

import copy
import pickle
import subprocess
import sys
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torchvision.models.densenet as tv_densenet
from torch import nn

import fastdense
from fastdense.fusion.plan.state import memory_of
from tests.cases.converted import (
    FUSED,
    MEMORY,
    NETS,
    Calls,
    assert_bit_equal,
    assert_same,
    fused_calls,
    images,
    one_warning,
    pair,
    randomise,
    step,
    timm_net,
    torchvision_net,
)
from tests.cases.random_block import relative

# A block that falls back where the test does not expect it fails the test.
pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]


# --- numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_three_training_steps_give_the_same_numbers(make, memory):
    plain, fast = pair(make, memory)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in (plain, fast)]
    for _ in range(3):
        x = images()
        expected, actual = step(plain, x), step(fast, x)
        assert_same(actual, expected)
        for optimizer in optimizers:
            optimizer.step()
    assert_same(fast.state_dict(), plain.state_dict())
    assert fast.features.norm5.num_batches_tracked == 3


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_eval_gives_the_same_numbers(make, memory):
    plain, fast = pair(make, memory)
    x = images()
    assert_same(step(fast.eval(), x), step(plain.eval(), x))


def test_densenet121_gives_the_same_numbers():
    torch.manual_seed(0)
    plain = randomise(tv_densenet.densenet121(num_classes=10).double())
    fast = fastdense.convert(copy.deepcopy(plain))
    x = images(batch=8)
    with Calls() as calls:
        actual = step(fast, x)
    assert calls.made == [(6, "transition"), (12, "transition"), (24, "transition"), (16, "norm")]
    assert_same(actual, step(plain, x))


def test_several_threads_in_the_operator():
    plain, fast = pair()
    x = images()
    expected = step(plain, x)
    torch.set_num_threads(3)
    assert_same(step(fast, x), expected)


def test_every_block_runs_with_what_follows_it_as_one_operator():
    _, fast = pair()
    assert fused_calls(fast, images()) == FUSED
    _, fast = pair(timm_net)
    assert fused_calls(fast, images()) == [(2, "transition"), (3, "norm_relu")]


def test_memory_modes_are_bit_equal():
    x = images()
    made = [step(pair(memory=memory)[1], x) for memory in MEMORY]
    for other in made[1:]:
        assert_bit_equal(other, made[0])


def test_running_statistics_are_updated_once():
    for memory in MEMORY:
        _, fast = pair(memory=memory)
        fast(images())
        tracked = {int(b) for name, b in fast.named_buffers() if name.endswith("num_batches_tracked")}
        assert tracked == {1}


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_the_libraries_own_checkpointing_does_not_matter(memory_efficient):
    for make in NETS.values():
        plain, _ = pair(make)
        _, fast = pair(make, memory_efficient=memory_efficient)
        x = images()
        assert_same(step(fast, x), step(plain, x))


def test_odd_sizes_and_a_batch_of_one():
    plain, fast = pair()
    for shape in ((1, 3, 70, 61), (3, 3, 33, 47)):
        x = torch.randn(shape, dtype=torch.float64)
        assert_same(step(fast, x), step(plain, x))


# --- what a conversion leaves alone ---------------------------------------------------------------------


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_state_dict_and_parameters_stay_the_same_objects(make):
    net = make()
    keys, parameters, buffers = list(net.state_dict()), list(net.parameters()), list(net.buffers())
    modules = [id(module) for module in net.modules()]
    for change in (fastdense.convert, fastdense.restore):
        change(net)
        assert list(net.state_dict()) == keys
        assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
        assert all(a is b for a, b in zip(net.buffers(), buffers, strict=True))
        assert [id(module) for module in net.modules()] == modules


def test_fused_modules_are_still_instances_of_the_plain_classes():
    _, fast = pair()
    assert isinstance(fast.features.denseblock1, tv_densenet._DenseBlock)
    assert isinstance(fast.features.transition1, tv_densenet._Transition)
    assert isinstance(fast.features, nn.Sequential)


def test_an_existing_optimizer_keeps_working():
    plain, fast = pair()
    fastdense.restore(fast)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in (plain, fast)]
    for index in range(3):
        if index == 1:
            fastdense.convert(fast)
        x = images()
        for net, optimizer in zip((plain, fast), optimizers, strict=True):
            step(net, x)
            optimizer.step()
    assert_same(fast.state_dict(), plain.state_dict())


def test_load_state_dict_both_ways():
    plain, fast = pair()
    x = images()
    for source, target in ((plain, fast), (fast, plain)):
        randomise(source)
        target.load_state_dict(source.state_dict(), strict=True)
        assert_same(step(target.eval(), x), step(source.eval(), x))


def test_old_torchvision_checkpoints_load():
    plain, fast = pair()
    randomise(plain)
    old = OrderedDict(
        (tv_old_key(key), value) for key, value in plain.state_dict().items() if "num_batches_tracked" not in key
    )
    assert "features.denseblock1.denselayer1.norm.1.weight" in old

    class Weights:
        def get_state_dict(self, **options):
            return old

    tv_densenet._load_state_dict(fast, Weights(), progress=False)
    x = images()
    assert_same(step(fast.eval(), x), step(plain.eval(), x))


def tv_old_key(key: str) -> str:
    """`denselayer1.norm1.weight` was `denselayer1.norm.1.weight`."""
    for name in ("norm", "conv"):
        for number in "12":
            if "denselayer" in key:
                key = key.replace(f".{name}{number}.", f".{name}.{number}.")
    return key


# --- convert and restore --------------------------------------------------------------------------------


def test_restore_gives_the_plain_classes_back():
    for make in NETS.values():
        plain, fast = pair(make)
        fastdense.restore(fast)
        assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]
        assert [sorted(vars(m)) for m in fast.modules()] == [sorted(vars(m)) for m in plain.modules()]
        assert fused_calls(fast, images()) == []


def test_converting_and_restoring_twice():
    plain, fast = pair()
    classes = [type(m) for m in fast.modules()]
    fastdense.convert(fast)
    assert [type(m) for m in fast.modules()] == classes
    x = images()
    assert_same(step(fast, x), step(plain, x))
    fastdense.restore(fastdense.restore(fast))
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]
    fastdense.convert(fast)
    assert fused_calls(fast, images()) == FUSED


def test_restore_leaves_other_models_alone():
    net = torchvision_net()
    classes = [type(m) for m in net.modules()]
    assert fastdense.restore(net) is net
    assert [type(m) for m in net.modules()] == classes


def test_converting_again_changes_the_memory_mode():
    plain, fast = pair(memory="balanced")
    x = images()
    kept = {}
    for memory in ("min", "balanced"):
        fastdense.convert(fast, memory=memory)
        with Calls() as calls:
            actual = step(fast, x)
        kept[memory] = sum(calls.kept)
        assert_same(actual, step(plain, x))
    # b = 24 numbers a pixel and layer: 2 layers on 16x16 pixels, 3 on 8x8, batch 2.
    assert kept == {"min": 0, "balanced": 2 * 24 * (2 * 16 * 16 + 3 * 8 * 8)}


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_deepcopy_is_fused_and_independent(make):
    plain, fast = pair(make, memory="min")
    twin = copy.deepcopy(fast)
    assert [type(m) for m in twin.modules()] == [type(m) for m in fast.modules()]
    assert memory_of(twin.features.denseblock1) == "min"
    with torch.no_grad():
        for p in fast.parameters():
            p.zero_()
    x = images()
    assert_same(step(twin, x), step(plain, x))


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_pickle_round_trip_and_restore(make):
    plain, fast = pair(make, memory="min")
    twin = pickle.loads(pickle.dumps(fast))
    x = images()
    assert [type(m) for m in twin.modules()] == [type(m) for m in fast.modules()]
    assert memory_of(twin.features.denseblock1) == "min"
    assert_same(step(twin, x), step(plain, x))
    fastdense.restore(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
    assert_same(step(twin, x), step(plain, x))


def test_torch_save_and_load_in_another_process(tmp_path):
    plain, fast = pair()
    x = images()
    torch.save((fast.eval(), x), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, x = torch.load(sys.argv[1], weights_only=False)\n"
        "import fastdense\n"
        "out = model(x)\n"
        "torch.save((out.detach(), type(model.features.denseblock1).__name__), sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt", tmp_path / "out.pt"], check=True)
    out, name = torch.load(tmp_path / "out.pt")
    assert name == type(fast.features.denseblock1).__name__ != "_DenseBlock"
    assert relative(out, plain.eval()(x)) <= 1e-10


def test_a_model_that_contains_densenets():
    def make():
        body = nn.ModuleDict({"tv": torchvision_net(), "timm": timm_net()})
        return nn.ModuleList([body, nn.Linear(5, 2).double()])

    def run(net, x):
        return net[1](net[0]["tv"](x) + net[0]["timm"](x))

    plain, fast = pair(make)
    x = images()
    with Calls() as calls:
        actual = step(fast, x, run=partial(run, fast))
    assert calls.made == [*FUSED, (2, "transition"), (3, "norm_relu")]
    assert_same(actual, step(plain, x, run=partial(run, plain)))


def test_a_block_or_a_transition_alone():
    def block():
        return randomise(tv_densenet._DenseBlock(3, 8, 4, 6, 0.0).double())

    plain, fast = pair(block)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == [(3, "none")]

    def two():
        return nn.ModuleDict({"block": block(), "transition": tv_densenet._Transition(8, 5).double()})

    plain, fast = pair(two)
    assert_same(step(fast["transition"], x), step(plain["transition"], x))
    assert fused_calls(fast["transition"], x) == [(0, "transition")]


def test_slices_of_the_features_stay_fused():
    plain, fast = pair()
    x = images()
    assert fused_calls(fast.features[:6], x) == FUSED[:1]
    assert relative(fast.features[:6](x), plain.features[:6](x)) <= 1e-10
    assert relative(fast.features[:5](x), plain.features[:5](x)) <= 1e-10


def test_timm_intermediate_features():
    plain, fast = pair(timm_net)
    x = images()
    with one_warning("the norm, ReLU and max pool before it"):
        last, intermediates = fast.forward_intermediates(x)
    expected_last, expected = plain.forward_intermediates(x)
    for actual, wanted in zip([last, *intermediates], [expected_last, *expected], strict=True):
        assert relative(actual, wanted) <= 1e-10


def test_functional_call_uses_the_given_parameters():
    plain, fast = pair()
    other = {name: p.detach() * 1.1 for name, p in plain.named_parameters()}
    x = images()
    actual, expected = (torch.func.functional_call(net.eval(), other, (x,)) for net in (fast, plain))
    assert relative(actual, expected) <= 1e-10


def test_nothing_found_names_what_was_looked_for():
    looked_for = (
        r"got Linear.*torchvision\.models\.densenet\._DenseBlock, timm.*, monai\.networks\.nets\.densenet\._DenseBlock"
    )
    with pytest.raises(ValueError, match=looked_for):
        fastdense.convert(nn.Linear(2, 2))


@pytest.mark.parametrize("function", [fastdense.convert, fastdense.restore, fastdense.report])
@pytest.mark.parametrize(
    ("model", "got"),
    [
        ("densenet121", r"the name 'densenet121'; make the model first, e.g. fastdense.models.create\('densenet121'\)"),
        (nn.Linear, r"the class Linear; make the model first, e.g. Linear\(...\)"),
        ({"weight": 1}, "dict$"),
    ],
)
def test_what_is_no_module_is_named(function, model, got):
    with pytest.raises(TypeError, match=f"^{function.__name__}: expected model to be a torch.nn.Module, got {got}"):
        function(model)


def test_unknown_memory_mode_changes_nothing():
    net = torchvision_net()
    with pytest.raises(ValueError, match=r"memory to be one of \('balanced', 'min', 'recompute'\), got 'tiny'"):
        fastdense.convert(net, memory="tiny")
    assert type(net.features.denseblock1) is tv_densenet._DenseBlock

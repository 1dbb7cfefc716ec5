# SPDX-License-Identifier: Apache-2.0
"""Dual path stages of any norms and activations on a shared buffer: the bits of plain modules, and linear memory."""

import contextlib
import copy
import functools
import pickle

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from timm.layers import GroupNormAct
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastdense
from fastdense.models import DPN
from fastdense.nn import DualPathBlock, DualPathStage
from tests.cases.converted import assert_bit_equal, assert_same, one_warning, randomise, step
from tests.cases.shared_buffer import SCALE, seeded_step

pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]

R, K, WIDTH, C0 = 6, 4, 8, 10
HINT = 'memory="min" runs it on a shared buffer'


def pair(blocks: int = 4, *, dtype=torch.float64, change=None, **options) -> tuple[nn.Module, nn.Module]:
    """Plain blocks in a row, and the same on a shared buffer."""
    torch.manual_seed(0)
    options = {"projection": True, "act": "silu", "memory": "min", "groups": 2, **options}
    channels = C0 if options["projection"] else R + 3
    fast = randomise(DualPathStage(blocks, channels, WIDTH, R, K, **options)).to(dtype)
    if change:
        change(fast)
    assert runs(fast) == ["shared buffer"] * blocks
    return fastdense.restore(copy.deepcopy(fast)), fast


def runs(net: nn.Module) -> list[str]:
    return [row.runs for row in fastdense.report(net).rows if row.kind == "dual path"]


def images(dims: int = 2, dtype=torch.float64, batch: int = 2, channels: int = C0) -> torch.Tensor:
    return torch.randn(batch, channels, *(7, 6, 5)[:dims], dtype=dtype)


# --- the same numbers -----------------------------------------------------------------------------------

OPTIONS = {
    "silu": {},
    "gelu, split": {"act": "gelu", "split_last": True},
    "prelu": {"act": "prelu", "memory": "recompute"},
    "group norm": {"norm": ("group", {"num_groups": 2}), "act": "relu"},
    "instance norm": {"norm": ("instance", {"affine": True, "track_running_stats": True}), "stride": 2},
    "stride": {"stride": 2},
    "one block": {"blocks": 1},
    "without a projection": {"projection": False},
    "dropped blocks": {"survival": [0.5] * 4},
    "dropped blocks, split": {"survival": [1, 0.3, 0.6, 0.5], "split_last": True, "survival_scale": "train"},
    "dropped samples": {"survival": [0.5] * 4, "survival_mode": "sample"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_all_kinds_of_stages(options):
    plain, fast = pair(**OPTIONS[options])
    x = images(channels=R + 3 if options == "without a projection" else C0)
    for seed in range(3):
        x = x + 0.1 * seed
        assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))
    assert_bit_equal(seeded_step(fast.eval(), x), seeded_step(plain.eval(), x))
    with torch.no_grad():
        assert torch.equal(fast(x), plain(x))


@pytest.mark.parametrize("dims", [1, 3])
def test_one_and_three_dimensions(dims):
    plain, fast = pair(spatial_dims=dims, stride=2)
    x = images(dims)
    assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_float32_in_both_layouts(layout, batch):
    plain, fast = pair(dtype=torch.float32, norm="group", split_last=True)
    x = images(dtype=torch.float32, batch=batch).contiguous(memory_format=layout)
    assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))
    assert fast(x).stride() == plain(x).stride()


def test_autocast():
    plain, fast = pair(dtype=torch.float32, norm="group")
    x = images(dtype=torch.float32)

    def under_autocast(net):
        def run(x):
            with torch.autocast("cpu", torch.bfloat16):
                return net(x)

        return run

    a, b = (seeded_step(net, x, run=under_autocast(net)) for net in (fast, plain))
    assert torch.equal(a["out"], b["out"])
    assert_same(a, b, tolerance=0.02)


def test_frozen_norms_and_parameters_and_an_input_without_gradient():
    plain, fast = pair()
    x = images()
    for net in (plain, fast):
        net.block1.requires_grad_(False)
        net.block3.c1x1_a.requires_grad_(False)
        net.block2.c3x3_b.bn.eval()
        net.block1.c1x1_w_s1.bn.eval()
    made = []
    for net in (plain, fast):
        net(x).square().sum().backward()
        made.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert made[0].keys() == made[1].keys() and len(made[0]) > 10
    assert_bit_equal(made[1], made[0])
    assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))
    for net in (plain, fast):
        net.requires_grad_(False)
    assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))
    assert not fast(x).requires_grad


def test_empty_batch_in_eval_mode():
    plain, fast = pair()
    x = images(batch=0)
    assert_bit_equal(seeded_step(fast.eval(), x), seeded_step(plain.eval(), x))


def test_dropout_and_other_modules_inside():
    def change(stage):
        stage.block2.c1x1_a = nn.Sequential(stage.block2.c1x1_a, nn.Dropout(0.4))
        stage.block3.c1x1_c.bn = nn.Sequential(stage.block3.c1x1_c.bn, nn.Dropout(0.4))

    plain, fast = pair(change=change)
    x = images()
    assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))


def test_under_a_checkpoint():
    for reentrant in (True, False):
        plain, fast = pair(survival=[0.5] * 4)
        x = images()
        fast_run, plain_run = (functools.partial(checkpoint, net, use_reentrant=reentrant) for net in (fast, plain))
        assert_bit_equal(seeded_step(fast, x, run=fast_run), seeded_step(plain, x, run=plain_run))


def test_compiled_code_runs_the_plain_modules():
    plain, fast = pair()
    x = images()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    assert_same(step(fast, x, run=compiled), step(plain, x))


def test_two_passes_before_one_backward_and_a_kept_graph():
    plain, fast = pair(survival=[0.5] * 4)
    made = []
    for net in (plain, fast):
        torch.manual_seed(3)
        x = images().requires_grad_()
        first, second = net(x), net(2 * x)
        first.square().sum().backward(retain_graph=True)
        torch.rand(5)
        second.square().sum().backward()
        first.sum().backward()
        made.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None} | {"input": x.grad})
    assert_bit_equal(made[1], made[0])


def test_modes_that_change_before_the_backward_pass():
    plain, fast = pair(survival=[0.5] * 4)
    made = []
    for net in (plain, fast):
        torch.manual_seed(3)
        out = net.train()(images())
        net.eval()
        out.square().sum().backward()
        made.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
        made[-1] |= dict(net.named_buffers())
    assert_bit_equal(made[1], made[0])


def test_copies_pickles_and_conversions():
    plain, fast = pair()
    x = images()
    converted = fastdense.convert(copy.deepcopy(plain), memory="min")
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), converted):
        fastdense.set_memory(twin, "recompute")
        assert runs(twin) == ["shared buffer"] * 4
        assert_bit_equal(seeded_step(twin, x), seeded_step(copy.deepcopy(plain), x))


# --- models, also of libraries ----------------------------------------------------------------------------


def small_dpn(**options) -> nn.Module:
    return DPN(
        stem_channels=4, width=4, groups=2, blocks=(2, 3), growth_rates=(2, 2), residual_channels=4, num_classes=3,
        **options,
    ).double()  # fmt: skip


def timm_net(change) -> nn.Module:
    """dpn68, whose ``act_layer`` is that of the stem: those of the blocks are exchanged."""
    torch.manual_seed(0)
    net = timm.create_model("dpn68", num_classes=5, act_layer="silu")
    net.features = nn.Sequential(*[net.features.get_submodule(name) for name in ("conv1_1", "conv1_pool", *BLOCKS)])
    for block in net.features[2:]:
        for name, norm in [(n, m) for n, m in block.named_modules() if type(m).__name__ == "BatchNormAct2d"]:
            change(block, name, norm)
    return randomise(nn.Sequential(net.features, nn.AdaptiveAvgPool2d(1)).double())


BLOCKS = ("conv2_1", "conv2_2", "conv2_3", "conv3_1", "conv3_2")
CHANGES = {
    "silu": lambda block, name, norm: setattr(norm, "act", nn.SiLU(inplace=True)),
    "group norm": lambda block, name, norm: block.set_submodule(name, GroupNormAct(norm.num_features, 2, eps=1e-3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_timm(change):
    plain = timm_net(CHANGES[change])
    fast = fastdense.convert(copy.deepcopy(plain), memory="min")
    assert runs(fast) == ["shared buffer"] * len(BLOCKS)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_bit_equal(step(fast, x), step(plain, x))
    assert fastdense.report(fast, (3, 64, 64)).kept_ratio < 0.3
    assert list(fast.state_dict()) == list(plain.state_dict())
    fastdense.restore(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]
    assert [sorted(vars(m)) for m in fast.modules()] == [sorted(vars(m)) for m in plain.modules()]


def test_the_activation_of_timm_s_stem_keeps_blocks_fused():
    net = fastdense.convert(timm.create_model("dpn68", act_layer="silu"), memory="min")
    assert set(runs(net)) == {"fused"}


@pytest.mark.parametrize("encoder", ["dpn68", "dpn68b"])
def test_blocks_that_hand_on_pairs(encoder):
    torch.manual_seed(0)
    features = smp.encoders.get_encoder(encoder, depth=3, weights=None).features
    plain = nn.Sequential(*[features.get_submodule(name) for name in ("conv1_1", *BLOCKS)], JoinedPaths())
    randomise(plain.double())
    for block in plain[1:-1]:
        for inner in block.modules():
            if hasattr(inner, "act"):
                inner.act = nn.Hardswish()
    fast = fastdense.convert(copy.deepcopy(plain), memory="min")
    assert runs(fast) == ["shared buffer"] * len(BLOCKS)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_bit_equal(step(fast, x), step(plain, x))
    first, second = (net[:5](x) for net in (fast, plain))
    assert [part.shape for part in first] == [part.shape for part in second]
    assert all(part.is_contiguous() for part in first)


class JoinedPaths(nn.Module):
    def forward(self, paths):
        return torch.cat(paths, 1)


@pytest.mark.parametrize("options", [{"act": "gelu"}, {"norm": ("group", {"num_groups": 2})}])
def test_own_networks(options):
    fast = small_dpn(memory="min", **options)
    plain = fastdense.restore(copy.deepcopy(fast))
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    assert_bit_equal(step(fast, x), step(plain, x))
    assert runs(fast) == ["shared buffer"] * 5


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["silu", "group norm", "dropped blocks"])
def test_what_is_saved_is_one_buffer_the_input_and_the_residual_paths(options):
    pixels, batchless = 16 * 16, []
    for blocks in (4, 12):
        _, fast = pair(blocks, dtype=torch.float32, **{**OPTIONS[options], "survival": 1.0})
        made = fastdense.report(fast, (C0, 16, 16))
        saved = pixels * (C0 + R + (2 + blocks) * K + (blocks - 1) * R) * 4
        statistics = made.kept_bytes - saved
        assert 0 <= statistics <= 0.01 * saved
        batchless.append(made.plain_bytes / made.kept_bytes)
    assert batchless[0] > 4 and batchless[1] > 1.3 * batchless[0]  # plain modules save the square


def test_a_stage_in_a_network_is_one_function():
    """Blocks one by one would save what each of them reads."""
    row = small_dpn(memory="min", act="gelu").float()
    kept = fastdense.report(row, (3, 64, 64)).kept_bytes
    alone = copy.deepcopy(row)
    for block in alone.features[2:7]:
        block.register_forward_hook(lambda *_: None)
    assert kept < fastdense.report(alone, (3, 64, 64)).kept_bytes < 0.5 * fastdense.report(row, (3, 64, 64)).plain_bytes


class Convolutions(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("split_last", [False, True])
def test_the_second_run_does_not_make_what_both_paths_have(split_last):
    _, fast = pair(split_last=split_last)
    out = fast(images())
    with Convolutions() as counted:
        out.sum().backward()
    assert counted.count == 2 * 4  # conv_a and conv_b: neither conv_c nor the projection


# --- what runs as plain modules ---------------------------------------------------------------------------


def test_balanced_stays_plain_and_says_what_min_does():
    plain = timm_net(CHANGES["silu"])
    with pytest.warns(UserWarning, match=f"stays plain: .* not a BatchNorm with ReLU; {HINT}"):
        fast = fastdense.convert(copy.deepcopy(plain))
    assert set(runs(fast)) == {"plain"}
    own = DualPathBlock(C0, WIDTH, R, K, act="silu")
    with one_warning("DualPathBlock runs as plain modules: ", "relu is a SiLU, not a ReLU", HINT):
        own(images(dtype=torch.float32))
    assert [(row.runs, HINT in row.reason) for row in fastdense.report(own).rows] == [("plain", True)]
    fastdense.set_memory(own, "min")
    assert runs(own) == ["shared buffer"]
    own(images(dtype=torch.float32)).sum().backward()
    own.memory = "reversible"
    assert runs(own) == ["plain"]


def test_hooks():
    plain, fast = pair()
    seen: list[str] = []
    handle = fast.block2.c1x1_a.register_forward_hook(lambda *_: seen.append("inner"))
    fast.block3.register_forward_hook(lambda *_: seen.append("block"))
    x = images()
    with one_warning("DualPathBlock runs as plain modules: c1x1_a has hooks"):
        assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))
    assert seen == ["inner", "block"]
    assert runs(fast) == ["shared buffer", "plain", "shared buffer", "shared buffer"]
    handle.remove()
    assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))


def test_blocks_of_an_operator_among_others():
    def change(stage):
        for name in ("c1x1_a", "c3x3_b", "c1x1_c"):
            stage.block3.get_submodule(name).relu = nn.ReLU(inplace=True)

    torch.manual_seed(0)
    fast = randomise(DualPathStage(4, C0, WIDTH, R, K, act="silu", memory="min").double())
    change(fast)
    plain = fastdense.restore(copy.deepcopy(fast))
    assert runs(fast) == ["shared buffer", "shared buffer", "fused", "shared buffer"]
    x = images()
    assert_same(seeded_step(fast, x), seeded_step(plain, x))


def test_modules_that_are_exchanged_later():
    fast = randomise(DualPathStage(3, C0, WIDTH, R, K, memory="min").double())
    x = images()
    fast(x)
    assert runs(fast) == ["fused"] * 3
    for block in fast:
        block.c1x1_c.relu = nn.ELU()
    assert runs(fast) == ["shared buffer"] * 3
    plain = fastdense.restore(copy.deepcopy(fast))
    assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))


def test_transforms_run_the_plain_modules():
    plain, fast = pair(1)
    x = images()
    with one_warning("only plain modules support forward-mode derivatives"):
        out, tangent = torch.func.jvp(fast.eval(), (x,), (torch.ones_like(x),))
    expected = torch.func.jvp(plain.eval(), (x,), (torch.ones_like(x),))
    assert torch.equal(out, expected[0]) and torch.equal(tangent, expected[1])


def test_parameters_of_a_graph_run_the_plain_modules():
    """Also where that is the first call; the next one runs on a shared buffer."""
    torch.manual_seed(0)
    fast = nn.Sequential(DualPathBlock(C0, WIDTH, R, K, act="silu", memory="min")).double().eval()
    plain, x, made = fastdense.restore(copy.deepcopy(fast)), images(), []
    for net in (plain, fast):
        twice = {name: 2 * p for name, p in net.named_parameters()}
        with contextlib.nullcontext() if net is plain else one_warning("its parameters belong to a graph"):
            torch.func.functional_call(net, twice, (x,)).square().sum().backward()
        made.append({name: p.grad for name, p in net.named_parameters()})
    assert_bit_equal(made[1], made[0])
    assert runs(fast) == ["shared buffer"]
    assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))


class Captured(nn.Module):
    def forward(self, x):
        return x * SCALE.to(x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: setattr(c, "bn", nn.Identity()), "a leaf Variable that requires grad is being used in an in-place"),
        (
            lambda c: setattr(c, "relu", Captured()),
            "it reads a tensor that requires grad and is none of its parameters",
        ),
        (lambda c: setattr(c, "others", [nn.ReLU()]), "others has modules or parameters that are not registered"),
    ],
)
def test_what_cannot_run_twice_stays_plain(change, reason):
    torch.manual_seed(0)
    block = DualPathBlock(C0, WIDTH, R, K, act="relu", norm="group", memory="min")
    fast = nn.Sequential(nn.Conv2d(C0, C0, 1), block).double()
    change(block.c1x1_a)
    plain = fastdense.restore(copy.deepcopy(fast))
    x = images()
    with one_warning("DualPathBlock runs as plain modules: ", "; nor does it run on a shared buffer: ", reason):
        assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))
    assert runs(fast) == ["plain"]


# --- errors, never a wrong number in silence --------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda stage: stage.block2.c1x1_a.conv.weight.data.__class__, None),
        (lambda stage: torch.no_grad()(stage.block2.c1x1_a.conv.weight.add_)(1), "a parameter"),
        (lambda stage: setattr(stage.block2.c1x1_a, "relu", nn.GELU()), "a DualPathBlock"),
        (lambda stage: stage.block3.c1x1_a.register_forward_hook(lambda *_: None), "a DualPathBlock"),
    ],
)
def test_changes_before_the_backward_pass_raise(change, changed):
    _, fast = pair()
    out = fast(images())
    change(fast)
    if changed is None:
        out.sum().backward()
    else:
        with pytest.raises(RuntimeError, match=f"{changed} has changed since the forward pass"):
            out.sum().backward()


def test_an_output_or_input_that_is_changed_in_place_raises():
    _, fast = pair()
    out = fast(images())
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    x = images()
    out = fast(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_double_backward_raises():
    _, fast = pair()
    x = images().requires_grad_()
    (grad,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a block on a shared buffer: double backward is not supported"):
        grad.sum().backward()


def test_wrong_channels_raise_as_in_plain_modules():
    plain, fast = pair()
    for net in (plain, fast):
        with pytest.raises(RuntimeError, match="running_mean should contain 11 elements not 10"):
            net(images(channels=C0 + 1).requires_grad_())

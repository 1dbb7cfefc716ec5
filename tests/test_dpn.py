# SPDX-License-Identifier: Apache-2.0
"""Dual path networks: published counts, timm's keys and numbers, conversion, hooks, the "b" variant, pooling."""

import copy
import json
import math
import warnings

import pytest
import timm
import torch
from timm.layers.test_time_pool import TestTimePoolHead as TimePoolHead
from torch import Tensor, nn

import fastdense
from fastdense import models
from fastdense.fusion.dual_path import FusedDualPathBlock
from fastdense.fusion.plan.state import memory_of
from fastdense.models import DPN, catalogue
from fastdense.nn import DualPathBlock, DualPathStage
from tests.cases.random_block import relative
from tests.cases.random_norms import random_norms

# name, parameters, multiply-adds at 224 in 1e9, size of the authors' file in MB, channels behind the stages
PUBLISHED = [
    ("dpn68", 12_611_602, 2.326, 49, [10, 144, 320, 704, 832]),
    ("dpn68b", 12_611_602, 2.326, 49, [10, 144, 320, 704, 832]),
    ("dpn92", 37_668_392, 6.502, 145, [64, 336, 704, 1552, 2688]),
    ("dpn98", 61_570_728, 11.671, 236, [96, 336, 768, 1728, 2688]),
    ("dpn107", 86_917_800, 18.299, 333, [128, 376, 1152, 2432, 2688]),
    ("dpn131", 79_254_504, 16.014, 304, [128, 352, 832, 1984, 2688]),
]
# Kept for the backward pass of one image by all blocks, in MiB, from the closed forms of the memory modes.
BLOCKS_KEEP = {"dpn68": 38.0, "dpn92": 60.7, "dpn98": 85.8, "dpn107": 115.8, "dpn131": 113.9}


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, all gradients and all buffers of a step."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    gradients = {f"grad of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "grad of x": x.grad} | gradients | {k: b.clone() for k, b in model.named_buffers()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative(actual[name].double(), value.double()) <= tolerance, name


@pytest.mark.parametrize(("name", "parameters", "gmac", "megabytes", "channels"), PUBLISHED)
def test_published_counts(name, parameters, gmac, megabytes, channels):
    with torch.device("meta"):
        model = models.create(name)
        maps = model.eval().forward_intermediates(torch.empty(1, 3, 224, 224))
        buffers = sum(b.numel() for b in model.buffers() if b.is_floating_point())
    assert sum(p.numel() for p in model.parameters()) == parameters
    counted = json.loads(catalogue.FILE.read_text())[name]  # tests/test_cli.py counts again
    assert counted["parameters"] == parameters
    assert round(counted["macs"] / 1e9, 3) == gmac
    assert math.ceil(4 * (parameters + buffers) / 2**20) == megabytes
    assert [m.shape[1] for m in maps] == channels
    assert [m.shape[2] for m in maps] == [112, 56, 28, 14, 7]


@pytest.mark.parametrize("name", BLOCKS_KEEP)
def test_blocks_keep_what_the_closed_form_says(name):
    with torch.device("meta"):
        model = models.create(name)
    x = torch.empty(1, 3, 224, 224, device="meta")
    maps = model.eval().forward_intermediates(x)
    kept = 0
    for index in range(len(maps) - 1):
        first, last = model._ends[index], model._ends[index + 1]
        first += index == 0  # the pooling
        block = model.features[first]
        n, r, width = last - first, block.num_1x1_c, block.c1x1_a.conv.out_channels
        pixels = maps[index + 1].shape[2] ** 2
        in_pixels = maps[index].shape[2] ** 2 if index else pixels  # the first stage reads the pooled map
        dense = maps[index + 1].shape[1] - r
        kept += pixels * (n * r + dense + 2 * n * width) + width * (in_pixels - pixels)
    assert round(4 * kept / 2**20, 1) == BLOCKS_KEEP[name]
    stem = 4 * maps[0].numel() + 5 * maps[0].numel() // 4  # a map; the pooled one, and a byte for where it comes from
    head = 4 * maps[-1].numel() + 4 * maps[-1].shape[1]
    counted = json.loads(catalogue.FILE.read_text())[name]  # tests/test_cli.py counts again
    assert abs(counted["kept_bytes"] - (4 * kept + stem + head)) < 0.02 * 4 * kept


@pytest.mark.parametrize("name", [row[0] for row in PUBLISHED] + ["dpn48b"])
def test_same_numbers_as_timm(name):
    theirs = random_norms(timm.create_model(name, num_classes=5).double())
    ours = models.create(name, num_classes=5).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for training in (True, False):
            assert_same(run(ours.train(training), x), run(theirs.train(training), x))


@pytest.mark.parametrize("memory", ["balanced", "min", "reversible"])
def test_convert_and_restore_of_timm(memory):
    plain = random_norms(timm.create_model("dpn48b", num_classes=5).double())
    model = fastdense.convert(copy.deepcopy(plain), memory=memory)
    fused = [m for m in model.modules() if isinstance(m, FusedDualPathBlock)]
    assert len(fused) == 16
    assert {memory_of(m) for m in fused} == {memory}
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for training in (True, True, False):
            assert_same(run(model.train(training), x), run(plain.train(training), x))
    assert list(model.state_dict()) == list(plain.state_dict())
    fastdense.restore(model)
    assert {type(m) for m in model.modules()} == {type(m) for m in plain.modules()}


def test_stages_are_one_operator_call_each():
    model = models.dpn48b(num_classes=2).eval()
    with torch.profiler.profile() as profile, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["fastdense::dual_path_stage"] == 4
    assert "aten::cat" not in counts or counts["aten::cat"] == 16  # the two halves of conv_c's weight, "b" variants


def test_checkpointing_and_intermediates_of_timm_still_work():
    plain = random_norms(timm.create_model("dpn48b", num_classes=5).double())
    model = fastdense.convert(copy.deepcopy(plain))
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    for a, b in zip(*(m.eval().forward_intermediates(x)[1] for m in (model, plain)), strict=True):
        assert relative(a, b) < 1e-12
    model.set_grad_checkpointing()  # which runs every module twice
    actual, expected = run(model.train(), x), run(plain.train(), x)
    for name in [name for name in expected if "conv1_1.bn" in name or "conv5_bn_ac.bn" in name]:
        if not name.startswith("grad"):  # plain modules, whose running statistics move twice
            del actual[name], expected[name]
    assert_same(actual, expected)


def test_a_hook_inside_a_block_splits_the_stage_and_is_called():
    plain = random_norms(timm.create_model("dpn48b", num_classes=5).double())
    model = fastdense.convert(copy.deepcopy(plain))
    seen = []
    model.features.conv4_3.c1x1_a.register_forward_hook(lambda *_: seen.append("inner"))
    model.features.conv3_2.register_forward_hook(lambda *_: seen.append("block"))
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"features.conv4_3 runs as plain modules: c1x1_a has hooks"):
        actual = run(model, x)
    assert seen == ["block", "inner"]
    assert_same(actual, run(plain, x))


@pytest.mark.parametrize("part", ["c1x1_a.conv", "c3x3_b.bn", "c1x1_c", "c1x1_w_s2"])
def test_replaced_sub_modules_run_plainly(part):
    plain = timm.create_model("dpn68", num_classes=5).double().eval()
    block = plain.features.conv3_1
    inner = block.get_submodule(part)
    block.set_submodule(part, nn.Sequential(inner))
    model = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match=r"features.conv3_1 stays plain: "):
        fastdense.convert(model)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert relative(model(x), plain(x)) < 1e-12


def test_frozen_norms_and_parameters_as_in_plain_modules():
    plain = random_norms(timm.create_model("dpn48b", num_classes=5).double()).train()
    for name, module in plain.named_modules():
        if isinstance(module, nn.BatchNorm2d) and "conv3" in name:
            module.eval()
    plain.features.conv4_1.requires_grad_(False)
    plain.features.conv1_1.requires_grad_(False)
    model = fastdense.convert(copy.deepcopy(plain))
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    assert_same(run(model, x), run(plain, x))


def test_68b_maps_onto_68_exactly():
    b, one = models.dpn68b(num_classes=3).double().eval(), models.dpn68(num_classes=3).double().eval()
    state = b.state_dict()
    for name in list(state):
        if "c1x1_c1" in name:
            prefix = name.removesuffix("c1x1_c1.weight")
            halves = [state.pop(f"{prefix}c1x1_c{half}.weight") for half in (1, 2)]
            state[f"{prefix}c1x1_c.conv.weight"] = torch.cat(halves)
    one.load_state_dict(state, strict=True)
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(one(x), b(x))


def test_test_time_pooling_is_timm_s():
    theirs = timm.create_model("dpn68", num_classes=5).double().eval()
    ours = models.dpn68(num_classes=5, test_time_pooling=True).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 288, 320, dtype=torch.float64)
    small = x[..., :224, :224]
    expected, pooled = theirs(small), TimePoolHead(theirs)(x)
    assert relative(ours(small), expected) < 1e-12
    assert relative(ours(x), pooled) < 1e-12


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("split_last", [False, True])
def test_stages_of_any_dimension(dims, split_last):
    stage = DualPathStage(
        3, 10, 8, 16, 4, groups=2, stride=2, split_last=split_last, spatial_dims=dims, memory="reversible"
    ).double()
    plain = fastdense.restore(copy.deepcopy(stage))
    assert not any(isinstance(m, FusedDualPathBlock) for m in plain.modules())
    x = torch.randn(3, 10, *[6, 5, 4][:dims], dtype=torch.float64)
    assert_same(run(stage, x), run(plain, x))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm": ("group", {"num_groups": 2})}, "bn is a GroupNorm, not a BatchNorm with ReLU"),
        ({"act": "gelu"}, "relu is a GELU, not a ReLU"),
    ],
)
def test_other_norms_and_activations_run_plainly_and_say_so(options, reason):
    model = DPN(
        stem_channels=4, width=4, groups=2, blocks=(2, 1), growth_rates=(2, 2), residual_channels=4, num_classes=3,
        **options,
    ).double()  # fmt: skip
    kinds = {type(m) for m in model.modules()}
    assert ({nn.GroupNorm, nn.ReLU} if "norm" in options else {nn.GELU, nn.BatchNorm2d}) <= kinds
    assert not {nn.BatchNorm2d, nn.ReLU} <= kinds
    plain = fastdense.restore(copy.deepcopy(model))
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    hint = 'memory="min" runs it on a shared buffer'
    with pytest.warns(UserWarning, match=f"DualPathBlock runs as plain modules: .*{reason}; {hint}"):
        for training in (True, False):
            assert_same(run(model.train(training), x), run(plain.train(training), x))


def test_activations_of_stem_and_head():
    kinds = [
        type(models.dpn48b(act="elu").get_submodule(f"features.{name}"))
        for name in ("conv1_1.act", "conv5_bn_ac.relu", "conv3_1.c1x1_a.relu")
    ]
    assert kinds == [nn.SiLU, nn.SiLU, nn.ELU]
    assert type(models.dpn68(act="elu").features.conv1_1.act) is nn.ELU


def test_blocks_alone_and_in_a_row_are_the_same():
    stage = DualPathStage(3, 10, 8, 16, 4, groups=2).double().eval()
    x = torch.randn(2, 10, 6, 5, dtype=torch.float64)
    one_by_one = x
    for block in stage:
        one_by_one = block(one_by_one)
    assert relative(stage(x), one_by_one) < 1e-14


def test_reversible_under_autocast_runs_plainly_and_says_so():
    stage = DualPathStage(2, 10, 8, 16, 4, memory="reversible")
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="supports float32 and float64, got"):
        stage(torch.randn(2, 10, 6, 6))


def test_compile_takes_a_whole_stage():
    stage = DualPathStage(2, 10, 8, 16, 4).double()
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        x = torch.randn(batch, 10, 6, 5, dtype=torch.float64)
        expected = run(copy.deepcopy(stage), x)
        actual = run(compiled, x)
        assert relative(actual["out"], expected["out"]) < 1e-12
        assert relative(actual["grad of x"], expected["grad of x"]) < 1e-12


def test_report_names_dual_path_blocks():
    model = fastdense.convert(timm.create_model("dpn48b"))
    rows = fastdense.report(model).rows
    assert [row.kind for row in rows] == ["dual path"] * 16
    assert {row.runs for row in rows} == {"fused"}


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("stride to be 1, or 2 with a projection", lambda: DualPathBlock(24, 8, 16, 4, stride=2)),
        ("stride to be 1, or 2", lambda: DualPathBlock(24, 8, 16, 4, stride=3, projection=True)),
        ("spatial_dims to be 1, 2 or 3", lambda: DualPathBlock(24, 8, 16, 4, spatial_dims=4)),
        ("in_channels to be at least residual_channels = 16", lambda: DualPathBlock(12, 8, 16, 4)),
        ("width to be a multiple of groups = 3", lambda: DualPathBlock(24, 8, 16, 4, groups=3)),
        ("memory to be one of", lambda: DualPathBlock(24, 8, 16, 4, memory="tiny")),
        ("num_blocks to be a positive integer", lambda: DualPathStage(0, 24, 8, 16, 4)),
        ("growth_rates to have one entry for each of 4 stages", lambda: models.DPN(growth_rates=(1, 2))),
        ("drop_rate to be a probability", lambda: models.DPN(drop_rate=2.0)),
        ("memory to be one of", lambda: fastdense.convert(models.densenet_cifar(10), memory="reversible")),
        ("dense or dual path blocks", lambda: fastdense.convert(nn.Linear(2, 2))),
    ],
)
def test_errors(message, make):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("memory", ["balanced", "min", "reversible"])
@pytest.mark.parametrize("name", ["dpn48b", "dpn68"])
def test_what_is_kept_between_steps_follows_the_weights(name, memory):
    """Three steps as by plain modules; the "b" variants join the weights of two convolutions."""
    plain = timm.create_model(name, num_classes=2).double()
    fast = fastdense.convert(copy.deepcopy(plain), memory=memory)
    batches = torch.rand(3, 4, 3, 32, 32, dtype=torch.float64)
    losses = []
    for net in (plain, fast):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.001)
        for x in batches:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(x), torch.tensor([0, 1, 0, 1]))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-6)

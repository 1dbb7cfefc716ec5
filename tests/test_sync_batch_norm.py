# SPDX-License-Identifier: Apache-2.0
"""Batch statistics shared by two processes, against one process that has the whole batch."""

import copy
from dataclasses import replace

import pytest
import timm.layers
import timm.models.dpn as timm_dpn
import torch
import torch.distributed as dist
from torch import nn

import fastdense
from fastdense.ops import Activation
from tests.cases.converted import (
    FUSED,
    assert_same,
    fused_calls,
    images,
    pair,
    randomise,
    step,
    timm_net,
    torchvision_net,
)
from tests.cases.dense_block import Block, Case
from tests.cases.dual_path import Stage, StageCase
from tests.cases.norm_relu_max_pool import Case as StemCase
from tests.cases.norm_relu_max_pool import Stem as PooledStem
from tests.cases.processes import part_of
from tests.cases.random_block import relative
from tests.emulation.blocks import on_device

DEVICES = ["cpu", "emulated"]
DENSE = [
    (Case(batch=4), "balanced", (2, 2)),
    (Case(batch=4, tail="transition", size=(6, 5)), "min", (3, 1)),
    (Case(batch=4, tail="norm", size=(6, 4, 5), num_layers=2), "balanced", (1, 3)),
    (Case(batch=4, tail="norm_relu", width=0, size=(9,)), "balanced", (3, 1)),
    (Case(batch=4, frozen=("norm2",), affine=False), "balanced", (3, 1)),
    (Case(batch=4, frozen=("0.norm1", "tail"), tail="transition"), "min", (3, 1)),
    (Case(batch=2, size=(1, 1)), "balanced", (1, 1)),
    (Case(batch=4, tail="transition", acts=(Activation("silu"), Activation("prelu"))), "min", (3, 1)),
    (Case(batch=4, tail="none", width=0, acts=(Activation("gelu"),), bias=True), "balanced", (1, 3)),
]
STAGES = [
    (StageCase(batch=4), "balanced", (2, 2)),
    (StageCase(batch=4, stride=2), "min", (3, 1)),
    (StageCase(batch=4, stride=2, size=(6, 4, 5)), "reversible", (1, 3)),
    (StageCase(batch=4, projection=False), "balanced", (3, 1)),
    (StageCase(batch=4, num_blocks=1, frozen=("norm_b",)), "balanced", (3, 1)),
]
STEMS = [
    (StemCase(batch=4), "balanced", (2, 2)),
    (StemCase(batch=4, channels_last=True), "balanced", (3, 1)),
    (StemCase(batch=4, frozen=("norm",), affine=False), "balanced", (1, 3)),
]


def check_shared(rank, make, case, memory, split, device):
    """A process's part of the batch gives its part of all results; gradients of parameters add up."""
    with on_device(device, 8 << 10):
        whole, mine = make(case), make(case)
        part = part_of(rank, split)
        mine.input = whole.input.detach()[part].requires_grad_()
        mine.process_group = dist.group.WORLD.group_name
        expected, statistics = whole.expected()
        grad = whole.normal(*expected.shape)
        wanted = whole.gradients(expected, grad)
        out, own = mine.run(memory)
        got = mine.gradients(out, grad[part])
        errors = {"out": relative(out, expected[part]), "input": relative(got["input"], wanted["input"][part])}
        if not case.frozen:
            errors["mean"] = relative(own.mean, statistics.mean)
            errors["var"] = relative(own.var, statistics.var)
        for name in mine.names:
            total = got[name].clone()
            dist.all_reduce(total)
            errors[name] = relative(total, wanted[name])
        wrong = {name: error for name, error in errors.items() if not error < 1e-11}  # a NaN is wrong
        assert not wrong, wrong
        return own.mean, own.var


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("make", "cases"),
    [(Block, DENSE), (Stage, STAGES), (PooledStem, STEMS)],
    ids=["dense_block", "dual_path_stage", "norm_relu_max_pool"],
)
def test_operator_shares_statistics(processes, make, cases, device):
    with on_device(device, 8 << 10):
        pass  # compiled here once, not by both
    for case, memory, split in cases:
        first, second = processes.run(check_shared, make, case, memory, split, device)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), case


@pytest.mark.parametrize(
    ("make", "case"),
    [
        (Block, Case(batch=4, tail="transition")),
        (Block, Case(batch=4, tail="norm_relu", width=0)),
        (Block, Case(batch=4, tail="transition", acts=(Activation("silu"), Activation("prelu")))),
        (Stage, StageCase(batch=4)),
        (PooledStem, StemCase(batch=4)),
        (PooledStem, StemCase(batch=4, channels_last=True)),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_a_process_may_have_no_values(processes, make, case, device):
    with on_device(device, 8 << 10):
        pass  # compiled here once, not by both
    processes.run(check_shared, make, case, "balanced", (4, 0), device)


def check_too_few(rank, make, case, images):
    block = make(case)
    block.input = block.input.detach()[: images[rank]].requires_grad_()
    block.process_group = dist.group.WORLD.group_name
    with pytest.raises(ValueError, match="expected more than 1 value per channel in all processes together"):
        block.run()


@pytest.mark.parametrize("images", [(0, 0), (1, 0)])
@pytest.mark.parametrize(
    ("make", "case"),
    [
        (Block, Case(size=(1, 1))),
        (Stage, StageCase(size=(1, 1))),
        (PooledStem, StemCase(size=(1, 1), kernel=(1, 1), padding=(0, 0))),
    ],
)
def test_all_processes_refuse_too_few_values(processes, make, case, images):
    processes.run(check_too_few, make, case, images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(processes, dtype):
    processes.run(check_type, dtype)


def check_type(rank, dtype):
    """The error against float64 is that of one process with the whole batch, but for the order of sums."""
    case = Case(batch=4, in_channels=24, growth_rate=12, width=48, size=(12, 12), dtype=dtype, tail="transition")
    exact, whole, mine = Block(replace(case, dtype=torch.float64)), Block(case), Block(case)
    with torch.no_grad():
        for target, source in zip([exact.input, *exact.parameters], [whole.input, *whole.parameters], strict=True):
            target.copy_(source)
    part = part_of(rank, (3, 1))
    mine.input = whole.input.detach()[part].requires_grad_()
    mine.process_group = dist.group.WORLD.group_name
    truth, _ = exact.expected()
    alone, _ = whole.run()
    shared, _ = mine.run()
    grad = exact.normal(*truth.shape)
    wanted = exact.gradients(truth, grad)["input"][part]
    theirs = whole.gradients(alone, grad.to(dtype))["input"][part]
    ours = mine.gradients(shared, grad[part].to(dtype))["input"]
    assert relative(shared.double(), truth[part]) <= 1.2 * relative(alone[part].double(), truth[part]) + 1e-6
    assert relative(ours.double(), wanted) <= 1.2 * relative(theirs.double(), wanted) + 1e-6


def exchanged(rank, group_is_shared):
    """Numbers that a block with a transition sends, forward and backward."""
    block = Block(Case(batch=4, tail="transition", size=(8, 8)))
    if group_is_shared:
        block.process_group = dist.group.WORLD.group_name
    with torch.profiler.profile(record_shapes=True) as forward:
        out, _ = block.run()
    with torch.profiler.profile(record_shapes=True) as backward:
        out.sum().backward()

    def sent(profile):
        return [event.input_shapes[0][0] for event in profile.events() if event.name.startswith("gloo:all_")]

    return sent(forward), sent(backward)


def test_only_new_channels_are_exchanged(processes):
    """Two numbers a channel and the count, of norm2's and of the layer's own channels; nothing of the prefix."""
    case = Case()
    width, growth = 2 * case.width + 1, 2 * case.growth_rate + 1
    for forward, backward in processes.run(exchanged, True):
        assert forward == [2 * case.in_channels + 1, *[width, growth] * case.num_layers]
        assert backward == [*[growth, width] * case.num_layers, 2 * case.in_channels + 1]
    assert processes.run(exchanged, False) == [([], []), ([], [])]


class Stem(nn.Module):
    """A first convolution, and what reads it."""

    def __init__(self, behind: nn.Module, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1).double()
        self.behind = behind

    def forward(self, x):
        return self.behind(self.stem(x))


def torchvision_blocks() -> nn.Module:
    return Stem(torchvision_net().features[1:], 8)


def timm_blocks() -> nn.Module:
    return Stem(timm_net().features[1:], 12)


def dual_path_blocks() -> nn.Module:
    sizes = {"k_sec": (1, 2, 1, 1), "inc_sec": (4, 4, 4, 4), "k_r": 8, "groups": 2, "num_init_features": 6}
    return Stem(randomise(timm_dpn.DPN(**sizes, small=True, num_classes=3).double()).features[2:6], 6)


BLOCKS = {"torchvision": torchvision_blocks, "timm": timm_blocks, "dpn": dual_path_blocks}


def check_blocks(rank, name, memory, synchronise_first, device):
    """Some blocks of a converted net: a training step on a part of the batch, then an eval step."""
    torch.manual_seed(0)
    plain = BLOCKS[name]()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    ours = copy.deepcopy(plain)
    synchronise = (
        nn.SyncBatchNorm.convert_sync_batchnorm if name == "torchvision" else timm.layers.convert_sync_batchnorm
    )
    if synchronise_first:
        ours = fastdense.convert(synchronise(ours), memory=memory)
    else:
        ours = synchronise(fastdense.convert(ours, memory=memory))
    part = part_of(rank, (3, 1))
    wanted, got = {}, {}
    for training in (True, False):
        plain.train(training)
        ours.train(training)
        grad = torch.randn_like(copy.deepcopy(plain)(x))
        wanted |= {f"{k}, {training=}": v for k, v in results(plain, x, grad).items()}
        with on_device(device, 8 << 10):
            got |= {f"{k}, {training=}": v for k, v in results(ours, x[part], grad[part]).items()}
    for key in wanted:
        if key.startswith(("out", "input")):
            wanted[key] = wanted[key][part]
        if key.startswith("grad"):
            dist.all_reduce(got[key])
    assert_same(got, wanted)


def results(net, x, grad):
    x = x.detach().requires_grad_()
    net.zero_grad()
    out = net(x)
    out.backward(grad)
    made = {"out": out.detach(), "input": x.grad}
    made |= {f"grad {name}": p.grad.clone() for name, p in net.named_parameters()}
    return made | {f"buffer {name}": b.clone() for name, b in net.named_buffers()}


@pytest.mark.parametrize("name", BLOCKS)
def test_converted_blocks(processes, name):
    """Running statistics included, whether norms or blocks are converted first."""
    processes.run(check_blocks, name, "balanced", True, "cpu")
    processes.run(check_blocks, name, "min", False, "cpu")
    processes.run(check_blocks, name, "balanced", False, "emulated")


def check_groups(rank):
    """Groups of one process share nothing; norms of different groups make the block plain."""
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.manual_seed(0)
    plain = torchvision_blocks()
    ours = fastdense.convert(copy.deepcopy(plain))
    nn.SyncBatchNorm.convert_sync_batchnorm(ours, alone)
    assert torch.allclose(ours(x), plain(x), rtol=1e-10)
    layer = ours.behind.denseblock1.denselayer1
    layer.norm1.process_group = dist.group.WORLD
    with (
        pytest.warns(UserWarning, match="its norms belong to different process groups"),
        pytest.raises(ValueError, match="SyncBatchNorm expected input tensor"),  # torch's own, on a CPU
    ):
        ours(x)


def test_groups(processes):
    processes.run(check_groups)


def test_without_a_group_a_sync_norm_is_a_batch_norm():
    plain, fast = map(nn.SyncBatchNorm.convert_sync_batchnorm, pair())
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == FUSED

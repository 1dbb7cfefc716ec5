# SPDX-License-Identifier: Apache-2.0
"""Converted models in PyTorch's data-parallel engines, against plain ones in the same engine."""

import contextlib
import copy
import importlib
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastdense
from tests.cases.any_layers import C0, Block
from tests.cases.converted import (
    FUSED,
    assert_bit_equal,
    assert_same,
    fastdense_warnings,
    fused_calls,
    pair,
    step,
    torchvision_net,
)
from tests.cases.dense_layouts import Net, plain_sequence
from tests.cases.processes import part_of

replicate_module = importlib.import_module("torch.nn.parallel.replicate")  # a function hides it


def batches(count: int, images: int = 4, size: int = 32):
    random = torch.Generator().manual_seed(1)
    return [torch.randn(images, 3, size, size, dtype=torch.float64, generator=random) for _ in range(count)]


def train(net, rank, *, split=(2, 2), accumulate=1, steps=3):
    """Parameters and buffers after some steps of SGD on this process's part of each batch."""
    world = len(split)  # whose gradients DDP averages
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for index, batch in enumerate(batches(steps * accumulate)):
        last = index % accumulate == accumulate - 1
        with contextlib.nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync():
            out = net(batch[part_of(rank, split)])
            (out.square().sum() / (out.shape[1] * sum(split) / world)).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


DDP = {
    "default": {},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "views of buckets": {"gradient_as_bucket_view": True},
    "own buffers": {"broadcast_buffers": False},
}


def check_ddp(rank, options, memory, **training):
    plain, fast = (DistributedDataParallel(net, **options) for net in pair(memory=memory))
    wanted, got = train(plain, rank, **training), train(fast, rank, **training)
    assert_same(got, wanted)
    assert fused_calls(fast.module, batches(1)[0]) == FUSED
    return got


def call(rank, function, arguments, keywords):
    return function(rank, *arguments, **keywords)


@pytest.mark.parametrize("options", DDP.values(), ids=DDP)
def test_ddp(processes, options):
    first, second = processes.run(call, check_ddp, (options, "balanced"), {})
    parameters = [name for name in first if "running" not in name]
    assert all(torch.equal(first[name], second[name]) for name in parameters)


@pytest.mark.parametrize("training", [{"accumulate": 2}, {"split": (3, 1)}], ids=["no_sync", "uneven batch"])
def test_ddp_training(processes, training):
    processes.run(call, check_ddp, ({}, "min"), training)


def check_two_forwards(rank):
    """Two forward passes in front of one backward pass, as of a siamese net."""
    plain, fast = (DistributedDataParallel(net, broadcast_buffers=False) for net in pair())
    made = []
    for net in (plain, fast):
        first, second = batches(2)
        (net(first) * net(second)).sum().backward()
        made.append({f"grad {name}": p.grad for name, p in net.named_parameters()})
    assert_same(made[1], made[0])


def test_ddp_with_two_forward_passes(processes):
    processes.run(check_two_forwards)


def check_sync_batch_norm(rank):
    """All norms but the first, which torch's own code runs, share statistics: as one process with the whole batch."""
    plain, fast = pair()
    for net in (plain, fast):
        net.features.norm0.eval()
    ddp = DistributedDataParallel(fast)  # which refuses such norms of a model on a CPU, if they are there already
    features = fast.features
    for name in ("denseblock1", "transition1", "denseblock2", "norm5"):
        setattr(features, name, nn.SyncBatchNorm.convert_sync_batchnorm(getattr(features, name)))
    wanted = train(plain, 0, split=(4,))
    got = train(ddp, rank, split=(3, 1))
    assert_same(got, {f"module.{name}": value for name, value in wanted.items()})


def test_ddp_with_sync_batch_norm(processes):
    processes.run(check_sync_batch_norm)


BLOCKS = ["features.denseblock1", "features.transition1", "features.denseblock2"]
LAYERS = ["features.denseblock1.denselayer1", "features.denseblock2.denselayer2"]
# What is sharded besides the root, and the operator's calls that are left: hooks of a module keep it apart from others.
SHARDED = {
    "root": ([], FUSED),
    "blocks": (BLOCKS, [(2, "none"), (0, "transition"), (3, "none")]),
    "layers": (LAYERS, [(0, "transition")]),
}


def check_fsdp(rank, where, reshard):
    """Blocks stay fused, unless their inner layers are sharded by themselves, which takes hooks."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    units, calls = SHARDED[where]
    made = []
    for net in pair():
        for unit in units:
            fully_shard(net.get_submodule(unit), mesh=mesh, reshard_after_forward=reshard)
        fully_shard(net, mesh=mesh, reshard_after_forward=reshard)
        with fastdense_warnings() as messages:
            state = train(net, rank)
        made.append({k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()})
    assert_same(made[1], made[0])
    assert fused_calls(net, batches(1)[0]) == calls
    assert len(messages) == (2 if where == "layers" else 0)
    assert all("has hooks" in message for message in messages)


@pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "keep"])
@pytest.mark.parametrize("where", SHARDED)
def test_fsdp(processes, where, reshard):
    processes.run(check_fsdp, where, reshard)


def check_found_blocks(rank):
    """Blocks of unknown classes are not tried again once they are sharded."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    made = []
    for net in pair(lambda: Net(plain_sequence).double()):
        for unit in (net.dense1, net):
            fully_shard(unit, mesh=mesh)
        with fastdense_warnings() as messages:
            state = train(net, rank)
        made.append({k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()})
    assert_same(made[1], made[0])
    assert fused_calls(net, batches(1)[0]) == [(2, "none"), (3, "none")]
    assert messages == []


def test_fsdp_of_found_blocks(processes):
    processes.run(check_found_blocks)


@pytest.mark.parametrize(
    ("make", "calls"), [(torchvision_net, FUSED), (lambda: Net(plain_sequence).double(), [(2, "none"), (3, "none")])]
)
def test_data_parallel_replicas(make, calls, monkeypatch):
    """What nn.DataParallel makes on every device, on one: its parameters are no parameters, but fused all the same."""

    def copies(tensors, devices, detach=False):
        return [[t.detach() if detach else t * 1 for t in tensors] for _ in devices]

    monkeypatch.setattr(replicate_module, "_broadcast_coalesced_reshape", copies)
    plain, fast = pair(make)
    x = batches(1)[0]
    wanted = step(plain, x)
    first, second = replicate_module.replicate(fast, [0, 1])
    assert fused_calls(second.eval(), x) == calls
    assert_same(step(fast, x, run=first.train()), wanted)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_ddp_finds_gradients_as_it_wants_them(processes, memory_format):
    """In the layout of their parameters: else it warns, and copies."""
    processes.run(check_layout, memory_format)


def check_layout(rank, memory_format):
    _, net = pair()
    net.to(memory_format=memory_format)
    ddp = DistributedDataParallel(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ddp(batches(1)[0]).sum().backward()
    for name, parameter in net.features.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


def check_shared_buffer(rank, options, accumulate=1, block=Block):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, C0, 3, stride=4), block()).double()
    fast = fastdense.convert(copy.deepcopy(plain), memory="min")
    assert {row.runs for row in fastdense.report(fast).rows} == {"shared buffer"}
    nets = [DistributedDataParallel(net, **options) for net in (plain, fast)]
    if accumulate > 1:  # a static graph is learnt from a step that is synchronised, also of plain modules
        assert_bit_equal(train(nets[1], rank, steps=1), train(nets[0], rank, steps=1))
    wanted, got = (train(net, rank, accumulate=accumulate) for net in nets)
    assert_bit_equal(got, wanted)


@pytest.mark.parametrize("options", DDP.values(), ids=DDP)
def test_ddp_of_layers_on_a_shared_buffer(processes, options):
    processes.run(check_shared_buffer, options)


def make_stage():
    return fastdense.restore(fastdense.nn.DualPathStage(3, C0, 8, 4, 2, act="silu", memory="min"))


@pytest.mark.parametrize("options", DDP.values(), ids=DDP)
def test_ddp_of_dual_path_blocks_on_a_shared_buffer(processes, options):
    processes.run(check_shared_buffer, options, 1, make_stage)


@pytest.mark.parametrize("options", [DDP["default"], DDP["static graph"]], ids=["default", "static graph"])
def test_ddp_of_layers_on_a_shared_buffer_with_no_sync(processes, options):
    processes.run(check_shared_buffer, options, 2)

# SPDX-License-Identifier: Apache-2.0
"""Max-pool transitions that run again in the backward pass: numbers, running statistics, what is kept, fallbacks."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastdense
from fastdense.models.fc_densenet import PlainTransitionDown, TransitionDown
from tests.cases.converted import assert_bit_equal, one_warning, randomise, step

pytestmark = pytest.mark.filterwarnings("error:fastdense")


def transition(channels: int = 5, drop_rate: float = 0.0, **options) -> nn.Module:
    torch.manual_seed(0)
    return randomise(TransitionDown(channels, drop_rate, **options).double())


def pair(**options) -> tuple[nn.Module, nn.Module]:
    fast = transition(**options)
    return fast, fastdense.restore(copy.deepcopy(fast))


def pictures(channels: int = 5) -> Tensor:
    return torch.randn(3, channels, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def kept_bytes(net: nn.Module, x: Tensor) -> int:
    """Of storages that autograd saves, but for parameters and the input."""
    others = {p.untyped_storage().data_ptr() for p in net.parameters()} | {x.untyped_storage().data_ptr()}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x.requires_grad_())
    return sum(size for pointer, size in storages.items() if pointer not in others)


@pytest.mark.parametrize("mode", ["train", "eval", "frozen norm", "untracked", "cumulative"])
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_same_bits_as_plain_modules(mode, drop_rate):
    made = []
    for net in pair(drop_rate=drop_rate):
        if mode == "eval":
            net.eval()
        if mode == "frozen norm":
            net.norm.eval()
        if mode == "untracked":
            net.norm.track_running_stats = False
        if mode == "cumulative":
            net.norm.momentum = None
        torch.manual_seed(2)
        made.append([step(net, pictures()) for _ in range(2)])
    for fast, plain in zip(*made, strict=True):
        assert_bit_equal(fast, plain)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
@pytest.mark.parametrize("norm", ["batch", "instance", ("group", {"num_groups": 5})], ids=str)
@pytest.mark.parametrize("act", ["gelu", "prelu"])
def test_other_norms_and_activations(norm, act, drop_rate, mode):
    made = []
    for net in pair(drop_rate=drop_rate, norm=norm, act=act):
        torch.manual_seed(2)
        made.append(step(getattr(net, mode)(), pictures()))
    assert_bit_equal(*made)
    assert kept_bytes(net, pictures()) > 3 * pictures().nbytes
    assert kept_bytes(pair(drop_rate=drop_rate, norm=norm, act=act)[0], pictures()) < 600


def test_is_plain_after_restore_and_converted_again():
    """Also where a network of somebody else has the same modules under other names."""
    plain = pair()[1]
    assert type(plain) is PlainTransitionDown
    block = fastdense.nn.DenseBlock(2, 3, 2)
    other = nn.Sequential(
        block, nn.Sequential(nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 4, 1), nn.Dropout2d(0.2), nn.MaxPool2d(2))
    )
    net = nn.Sequential(block, plain, other)
    fastdense.convert(net)
    assert type(plain) is TransitionDown
    assert kept_bytes(plain.train(), pictures()) < 600  # copies of the running statistics, no map
    wanted = {"1": "fused", "2.1": "fused"}
    kinds = {row.name: row.runs for row in fastdense.report(net).rows if row.kind == "max-pool transition"}
    assert kinds == wanted
    assert type(pickle.loads(pickle.dumps(other))[1]) is type(other[1])


def test_other_convolutions_in_front_of_a_pool_are_no_transitions():
    conv = nn.Sequential(nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 4, 3, padding=1), nn.MaxPool2d(2))
    net = fastdense.convert(nn.Sequential(fastdense.nn.DenseBlock(2, 3, 2), conv))  # a warning fails the test
    assert [row.kind for row in fastdense.report(net).rows] == ["block"]


def test_takes_any_memory_mode():
    """One that only another block of the model knows must not stop the conversion."""
    with torch.device("meta"):
        net = nn.Sequential(fastdense.models.create("dpn48b"), PlainTransitionDown(5, 0.0))
    assert type(fastdense.convert(net, memory="reversible")[1]) is TransitionDown


def test_keeps_no_map():
    fast, plain = pair()
    assert kept_bytes(plain, pictures()) > 2 * pictures().nbytes
    assert kept_bytes(fast, pictures()) < 600


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_mode_changed_between_forward_and_backward(norm):
    made = []
    for net in pair(drop_rate=0.3, norm=norm):
        torch.manual_seed(2)
        x = pictures().requires_grad_()
        out = net(x)
        net.eval()
        out.sum().backward()
        made.append({"grad input": x.grad, "grad weight": net.norm.weight.grad})
    assert_bit_equal(*made)


def test_running_statistics_move_once_under_an_outer_checkpoint():
    fast, plain = pair()
    outer = step(fast, pictures(), run=lambda x: checkpoint(fast, x, use_reentrant=False))
    assert_bit_equal(outer, step(plain, pictures()))


def test_backward_twice():
    fast, plain = pair()
    grads = []
    for net in (fast, plain):
        out = net(pictures())
        first = torch.autograd.grad(out.sum(), net.parameters(), retain_graph=True)
        second = torch.autograd.grad(out.sum(), net.parameters())
        assert all(map(torch.equal, first, second))
        grads.append(dict(zip("abc", first, strict=True)))
    assert_bit_equal(*grads)


def test_compiles_whole():
    fast, plain = pair()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    actual, expected = step(fast, pictures(), run=compiled), step(plain, pictures())
    torch.testing.assert_close(actual["out"], expected["out"])
    torch.testing.assert_close(actual["buffer norm.running_mean"], expected["buffer norm.running_mean"])


def test_autocast():
    made = []
    for net in pair():
        with torch.autocast("cpu", torch.bfloat16):
            made.append(step(net.float(), pictures().float()))
    assert_bit_equal(*made)


def hook(net: nn.Module) -> None:
    net.conv.register_forward_hook(lambda module, args, out: 2 * out)


def sync(net: nn.Module) -> None:
    net.norm = nn.SyncBatchNorm.convert_sync_batchnorm(net.norm).eval()


def tracked(net: nn.Module) -> None:
    net.norm = nn.InstanceNorm2d(5, track_running_stats=True).double()


def more(net: nn.Module) -> None:
    net.add_module("more", nn.Tanh())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook, "has hooks"),
        (sync, "SyncBatchNorm"),
        (tracked, "norm is a InstanceNorm2d: expected a BatchNorm"),
        (more, "its modules are not norm, activation"),
    ],
)
def test_falls_back(change, reason):
    fast, plain = pair()
    change(fast), change(plain)
    with one_warning("runs as plain modules", reason):
        made = step(fast, pictures())
    assert_bit_equal(made, step(plain, pictures()))

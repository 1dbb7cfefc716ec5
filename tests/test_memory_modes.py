# SPDX-License-Identifier: Apache-2.0
"""The mode "recompute", and modes set per block: the same bits, fewer bytes, and clear errors."""

import copy
import dataclasses
import itertools
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdense
from fastdense._C import AllocationTape
from fastdense.memory.modes import fused_blocks
from fastdense.ops import residual_dense_block
from tests.cases.converted import NETS, assert_bit_equal, assert_same, images, pair, randomise, step, torchvision_net
from tests.cases.dense_block import ACTIVATIONS
from tests.cases.dense_block import Block as DenseBlock
from tests.cases.dense_block import Case as DenseCase
from tests.cases.families import MODES
from tests.cases.families import pair as family_pair
from tests.cases.monai import monai_net, volume
from tests.cases.residual_dense_block import Block, Case

pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]


class Convolutions(TorchDispatchMode):
    """Counts torch's convolutions and backward passes of them."""

    forward = backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is torch.ops.aten.convolution.default
        self.backward += func is torch.ops.aten.convolution_backward.default
        return func(*args, **(kwargs or {}))


def kept_bytes(net: nn.Module, x: Tensor) -> int:
    parameters = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net(x)
    del out
    return sum(kept.values())


@pytest.mark.parametrize("name", [name for name, memory in MODES if memory == "recompute"])
def test_all_families_give_the_bits_of_min(name):
    plain, fast, x = family_pair(name, "recompute")
    reference = copy.deepcopy(fast)
    fastdense.set_memory(reference, "min")
    for _ in range(2):
        torch.manual_seed(1)
        expected = step(plain, x)
        torch.manual_seed(1)
        actual = step(fast, x)
        torch.manual_seed(1)
        assert_bit_equal(actual, step(reference, x))
        assert_same(actual, expected)


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_a_stem_runs_its_convolution_again_and_saves_its_input(make):
    plain, fast = pair(make, "recompute")
    x = images()
    with Convolutions() as calls:
        actual = step(fast, x)
    with Convolutions() as plainly:
        expected = step(plain, x)
    assert_same(actual, expected)
    assert plainly.forward == plainly.backward > 1
    # One of the stem, one again; its backward pass alone is left of the library's.
    assert (calls.forward, calls.backward) == (2, 1)
    features = plain.features.conv0(x)
    least = kept_bytes(fastdense.set_memory(copy.deepcopy(fast), "min"), x) - features.untyped_storage().nbytes()
    assert kept_bytes(fast, x) < least


# Layers so narrow that backward makes what norm2 reads in pieces, see makes_pieces() in dense_block_backward_cpu.cpp.
NARROW = DenseCase(batch=6, size=(33, 31))
IN_PIECES = {
    "squares": NARROW,
    "volume": dataclasses.replace(NARROW, size=(9, 10, 11)),
    "line": dataclasses.replace(NARROW, size=(1000,)),
    "wide images": dataclasses.replace(NARROW, batch=2, size=(19, 150)),
    "norms of samples": dataclasses.replace(NARROW, norm_groups=2, acts=ACTIVATIONS, bias=True),
    "transition, dropout": dataclasses.replace(NARROW, tail="transition", drop_rate=0.3),
    "frozen": dataclasses.replace(NARROW, frozen=("norm1", "norm2")),
    "float32": dataclasses.replace(NARROW, dtype=torch.float32, tail="norm_relu"),
    "bfloat16": dataclasses.replace(NARROW, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", IN_PIECES.values(), ids=IN_PIECES)
def test_pieces_of_bottlenecks_change_no_bit(case, threads):
    gradients = []
    torch.set_num_threads(threads)
    for memory in ("balanced", "min"):
        block = DenseBlock(dataclasses.replace(case, memory=memory))
        out, _ = block.run()
        gradients.append(
            torch.autograd.grad(out.float().square().sum(), [block.input, *block.parameters], allow_unused=True)
        )
    for kept, again in zip(*gradients, strict=True):
        assert (kept is None) == (again is None)
        assert kept is None or torch.equal(kept, again)


def test_pieces_of_bottlenecks_save_memory():
    peaks = []
    for batch in (4, 8):
        block = DenseBlock(dataclasses.replace(NARROW, batch=batch, width=64, memory="min"))
        out, _ = block.run()
        gradient = torch.rand_like(out)
        with AllocationTape("cpu") as tape:
            out.backward(gradient)
        peaks.append(max(itertools.accumulate(tape.bytes)))
    pixels, channels = 4 * 33 * 31, 10 + 3 * 6
    # The gradient of all channels, of norm2's output, of the new channels: norm2's input is not among them.
    assert (peaks[1] - peaks[0]) / pixels / 8 == pytest.approx(channels + 64 + 6, rel=0.01)


def test_stems_of_volumes_and_with_autocast():
    torch.manual_seed(0)
    net = monai_net()
    fast = fastdense.convert(copy.deepcopy(net), memory="recompute")
    reference = fastdense.convert(copy.deepcopy(net), memory="min")
    x = volume(3)
    assert_bit_equal(step(fast, x), step(reference, x))
    fast, reference = fast.float(), reference.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert_bit_equal(step(fast, x.float()), step(reference, x.float()))


@pytest.mark.parametrize("frozen", ["norm", "conv", "everything"])
def test_frozen_stems(frozen):
    plain, fast = pair(memory="recompute")
    for net in (plain, fast):
        if frozen != "conv":
            net.features.norm0.eval()
        if frozen != "norm":
            net.features.conv0.requires_grad_(False)
        if frozen == "everything":
            net.features.norm0.requires_grad_(False)
    x = images()
    assert_same(step(fast, x), step(plain, x))


def test_hooks_on_a_stems_convolution_are_called_once():
    plain, fast = pair(memory="recompute")
    seen = []
    fast.features.conv0.register_forward_hook(lambda *_: seen.append(1))
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert seen == [1]


def test_double_backward_of_a_stem_raises():
    _, fast = pair(memory="recompute")
    x = images().requires_grad_()
    (grad,) = torch.autograd.grad(fast(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_dropout_and_running_statistics_are_those_of_one_run():
    made, x = [], images()
    for memory in ("balanced", "recompute"):
        torch.manual_seed(5)
        net = fastdense.convert(torchvision_net(drop_rate=0.4), memory=memory)
        made.append([step(net, x) for _ in range(2)])
        assert all(int(n) == 2 for name, n in net.named_buffers() if name.endswith("num_batches_tracked"))
    for ours, theirs in zip(*made, strict=True):
        assert_bit_equal(ours, theirs)


def test_weights_that_change_before_backward_are_refused():
    _, fast = pair(memory="recompute")
    out = fast(images()).sum()
    with torch.no_grad():
        fast.features.denseblock1.denselayer1.conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_an_input_that_changes_before_backward_is_refused():
    block = fastdense.nn.DenseBlock(2, 8, 4, memory="recompute")
    x = torch.randn(2, 8, 6, 6)
    out = block(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="what a fused module gave, or read, was modified in place"):
        out.backward()


def test_a_chain_of_residual_blocks_saves_one_input_a_block(device):
    block = Block(Case(channels=8, growth=4, layers=4, size=(10, 10)), torch.float32, device)
    grads = {}
    for memory in ("balanced", "recompute"):
        out = block.run(partial(residual_dense_block, memory=memory))
        grads[memory] = torch.autograd.grad(out.sum(), [t for t in block.tensors() if t.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads.values(), strict=True))
    net = fastdense.models.create("rrdbnet", blocks=2)
    x = torch.randn(1, 3, 12, 12)
    inside = {
        m: kept_bytes(fastdense.set_memory(net, m).body, torch.randn(1, 64, 12, 12)) for m in ("min", "recompute")
    }
    assert inside["recompute"] <= 0.4 * inside["min"]
    assert kept_bytes(net, x) > 0


@pytest.mark.parametrize("memory", ["balanced", "recompute"])
@pytest.mark.parametrize("norm", ["batch", "instance", ("instance", {"affine": True}), ("group", {"num_groups": 2})])
@pytest.mark.parametrize("act", ["relu", "leakyrelu", "gelu", "prelu"])
def test_stems_of_other_norms_and_activations_save_their_input(norm, act, memory):
    torch.manual_seed(0)
    net = monai_net(norm=norm, act=act)
    fast = fastdense.convert(copy.deepcopy(net), memory=memory)
    x = volume(3)
    assert_same(step(fast, x), step(net, x))
    front = torch.nn.Sequential(*list(net.features.children())[:4])
    fused = type(fast.features)()
    for name, module in list(fast.features.named_children())[:4]:
        fused.add_module(name, module)
    features = net.features.conv0(x).untyped_storage().nbytes()
    assert kept_bytes(fused, x) <= x.nbytes + 1.3 * features < kept_bytes(front, x)


# Modes by block.


def modes(net: nn.Module) -> list[str]:
    return [block.memory for block in fused_blocks(net)]


def test_modes_per_block():
    plain, fast = pair()
    x = images()
    expected = step(plain, x)
    assert modes(fast) == ["balanced", "balanced"]
    assert fastdense.set_memory(fast, {"features.denseblock2": "recompute"}) is fast
    assert modes(fast) == ["balanced", "recompute"]
    fastdense.set_memory(fast, {"features.denseblock1": "recompute", "features": "min"})
    assert modes(fast) == ["recompute", "min"]
    assert_same(step(fast, x), expected)
    fastdense.set_memory(fast, "min")
    assert modes(fast) == ["min", "min"]


def test_every_mix_of_modes_gives_the_same_bits():
    _, fast = pair()
    x = images()
    expected = step(copy.deepcopy(fast), x)
    for first in ("balanced", "min", "recompute"):
        for second in ("balanced", "min", "recompute"):
            net = copy.deepcopy(fast)
            fastdense.set_memory(net, {"features.denseblock1": first, "features.denseblock2": second})
            assert_bit_equal(step(net, x), expected)


def test_a_mode_that_changes_is_seen_at_the_next_step():
    _, fast = pair()
    x = images()
    sizes = [kept_bytes(fastdense.set_memory(fast, memory), x) for memory in ("balanced", "min", "recompute", "min")]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[1] == sizes[3]


def test_dual_path_stages_part_where_modes_differ():
    torch.manual_seed(0)
    net = randomise(timm.create_model("dpn68", num_classes=3)).double()
    fast = fastdense.convert(copy.deepcopy(net))
    fastdense.set_memory(fast, {"features.conv3_1": "recompute", "features.conv3_2": "reversible"})
    assert {"balanced", "recompute", "reversible"} == set(modes(fast))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_same(step(fast, x), step(net, x))


@pytest.mark.parametrize(
    "memory, message",
    [
        ("tiny", "one of .*'recompute'.*got 'tiny'"),
        ({"features.denseblock1": "reversible"}, "mode of features.denseblock1 to be one of"),
        ({"features.denseblock1": "min", "features.nowhere": "min"}, "a name of a fused block"),
        ({"features.transition1": "min"}, "a name of a fused block"),
    ],
)
def test_bad_modes_change_nothing(memory, message):
    _, fast = pair()
    with pytest.raises(ValueError, match=message):
        fastdense.set_memory(fast, memory)
    assert modes(fast) == ["balanced", "balanced"]


def test_what_is_not_converted_has_no_modes():
    with pytest.raises(ValueError, match=r"call fastdense.convert\(model\)"):
        fastdense.set_memory(torchvision_net(), "min")
    with pytest.raises(TypeError, match="set_memory"):
        fastdense.set_memory("net", "min")
    with pytest.raises(TypeError, match="expected memory to be a mode, or a dict of names and modes, got 3"):
        fastdense.set_memory(pair()[1], 3)
    with pytest.raises(TypeError, match="expected names of blocks to be strings, got 1"):
        fastdense.set_memory(pair()[1], {1: "min"})


def test_compiled_models_save_what_min_saves():
    _, fast = pair(memory="recompute")
    reference = fastdense.set_memory(copy.deepcopy(fast), "min")
    x = images()
    expected = step(reference, x)
    compiled = torch.compile(fast, backend="aot_eager")
    assert_same(step(fast, x, compiled), expected)
    kept = [kept_bytes(net, x) for net in (compiled, torch.compile(reference, backend="aot_eager"))]
    assert kept[0] == kept[1]

# SPDX-License-Identifier: Apache-2.0
"""convert on dense blocks of unknown classes: found by structure, proved by a trial."""

import copy
import pickle
import random

import pytest
import timm
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

import fastdense
from fastdense.fusion import inferred_layers
from fastdense.fusion.equivalence import double_copy
from tests.cases.converted import (
    MEMORY,
    assert_same,
    fastdense_warnings,
    fused_calls,
    one_warning,
    pair,
    randomise,
    step,
)
from tests.cases.dense_layouts import (
    C0,
    LAYOUTS,
    Collecting,
    Joining,
    K,
    Layer,
    Net,
    NewestFirstLayer,
    SequenceLayer,
    plain_sequence,
    widths,
)

pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]

FUSED = [(2, "none"), (3, "none")]


def net(block=plain_sequence, **options) -> nn.Module:
    return randomise(Net(block, **options).double())


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 14, 17, dtype=torch.float64)


def of(layer, **options):
    """A block whose layers, of the given class, join."""
    return lambda layers: plain_sequence(layers, layer, **options)


# --- what is found --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_numbers(name, bottleneck):
    plain, fast = pair(net, block=LAYOUTS[name], bottleneck=bottleneck)
    x = images()
    for _ in range(2):
        assert_same(step(fast, x), step(plain, x))
    assert_same(step(fast.eval(), x), step(plain.eval(), x))
    assert fused_calls(fast, x) == FUSED
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert [(row.kind, row.layers, row.runs) for row in fastdense.report(fast).rows] == [
        ("block", 2, "fused"),
        ("block", 3, "fused"),
    ]
    fastdense.restore(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]
    assert [sorted(vars(m)) for m in fast.modules()] == [sorted(vars(m)) for m in plain.modules()]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("layer", [Layer, NewestFirstLayer])
@pytest.mark.parametrize("tail", ["transition", "norm", "norm, eval"])
def test_a_block_runs_with_what_follows_it(tail, layer, memory):
    def make() -> nn.Module:
        channels = C0 + 3 * K
        last = nn.BatchNorm2d(channels)
        if tail == "transition":
            names = ("norm", "relu", "conv", "pool")
            modules = (last, nn.ReLU(), nn.Conv2d(channels, 7, 1, bias=False), nn.AvgPool2d(2))
            last = nn.Sequential()
            for name, module in zip(names, modules, strict=True):
                last.add_module(name, module)
        return randomise(nn.Sequential(plain_sequence(3, layer), last).double())

    plain, fast = pair(make, memory)
    if tail == "norm, eval":
        plain[1].eval()
        fast[1].eval()
    x = torch.randn(2, C0, 8, 9, dtype=torch.float64)
    for _ in range(2):
        assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == [(3, tail.split(",")[0])]


@pytest.mark.parametrize(
    ("conv", "norm", "sizes"), [(nn.Conv1d, nn.BatchNorm1d, (40,)), (nn.Conv3d, nn.BatchNorm3d, (5, 6, 4))]
)
def test_one_and_three_dimensions(conv, norm, sizes):
    def make() -> nn.Module:
        block = Joining(3)
        for at, channels in enumerate(widths(3)):
            block.units[at] = nn.Sequential(norm(channels), nn.ReLU(), conv(channels, K, 3, padding=1, bias=False))
        return randomise(block.double())

    plain, fast = pair(make)
    x = torch.randn(3, C0, *sizes, dtype=torch.float64)
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == [(3, "none")]


@pytest.mark.parametrize("layer", [Layer, NewestFirstLayer])
def test_frozen_and_unusual_norms(layer):
    def change(model: nn.Module) -> None:
        first, second = model.dense2[0], model.dense2[1]
        first.bn1.eval()
        first.bn2.weight.requires_grad_(False)
        second.bn1 = nn.BatchNorm2d(C0 + K, momentum=None, affine=False).double()
        second.bn2 = nn.BatchNorm2d(8, eps=1e-2, track_running_stats=False).double()

    plain, fast = pair(net, change=change, block=of(layer))
    x = images()
    for _ in range(2):
        assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == FUSED


@pytest.mark.parametrize("layer", [Layer, SequenceLayer])
def test_dropout_is_read_at_each_call(layer):
    _, fast = pair(net, block=of(layer, drop=0.5))
    x = images()
    assert not torch.equal(fast(x), fast(x))
    torch.manual_seed(1)
    first = fast(x)
    torch.manual_seed(1)
    assert torch.equal(fast(x), first)
    assert fused_calls(fast, x) == FUSED
    for module in fast.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop"):
            module.drop = 0.0
    plain = fastdense.restore(copy.deepcopy(fast))
    assert_same(step(fast, x), step(plain, x))
    assert_same(step(fast.eval(), x), step(plain.eval(), x))


def test_the_share_of_dropped_features():
    block = fastdense.convert(plain_sequence(2, Layer, drop=0.25))
    kept = block(torch.randn(8, C0, 40, 40))[:, C0:] != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)


def test_a_copy_a_pickle_and_a_second_conversion():
    plain, fast = pair(net, "min")
    x = images()
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fastdense.convert(copy.deepcopy(fast))):
        assert_same(step(twin, x), step(copy.deepcopy(plain), x))
        assert fused_calls(twin.eval(), x) == FUSED
        assert [type(m) for m in fastdense.restore(twin).modules()] == [type(m) for m in plain.modules()]


def test_compile_as_one_graph():
    plain, fast = pair(net, block=of(NewestFirstLayer))
    x = images()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    assert_same(step(fast, x, run=compiled), step(plain, x))


def test_shared_batch_norms_are_tried_as_local_ones():
    plain, fast = pair(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(net()))
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in double_copy(fast.dense1).modules())
    x = images()
    assert_same(step(fast.eval(), x), step(plain.eval(), x))
    assert fused_calls(fast, x) == FUSED


def row(layer=Layer, **options) -> nn.Module:
    """A transition and, in the same sequence, three layers."""
    heads = [nn.Conv2d(3, 9, 3, padding=1), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, C0, 1), nn.AvgPool2d(2)]
    return randomise(nn.Sequential(*heads, *plain_sequence(3, layer, **options)).double())


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("layer", [Layer, NewestFirstLayer, SequenceLayer])
def test_layers_at_the_end_of_a_sequence(layer, memory):
    plain, fast = pair(row, memory, layer=layer)
    x = images()
    for _ in range(2):
        assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast.eval(), x) == [(3, "none")]
    assert_same(step(fast, x), step(plain.eval(), x))
    assert [(entry.layers, entry.runs) for entry in fastdense.report(fast).rows] == [(3, "fused")]
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fastdense.convert(copy.deepcopy(fast))):
        assert_same(step(twin, x), step(plain, x))
        assert fused_calls(twin, x) == [(3, "none")]
    assert list(fast.state_dict()) == list(plain.state_dict())
    fastdense.restore(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]
    assert [sorted(vars(m)) for m in fast.modules()] == [sorted(vars(m)) for m in plain.modules()]


def test_hooks_in_a_sequence_that_ends_with_layers():
    plain, fast = pair(row, drop=0.0)
    seen: list[str] = []
    fast[1].register_forward_hook(lambda *_: seen.append("head"))
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast.eval(), x) == [(3, "none")]
    fast.train()
    handle = fast[-1].register_forward_hook(lambda *_: seen.append("layer"))
    with one_warning("7 has hooks"):
        assert_same(step(fast, x), step(plain, x))
    assert seen == ["head", "head", "head", "layer"]
    handle.remove()
    assert fused_calls(fast, x) == [(3, "none")]


def test_parts_of_a_sequence_that_ends_with_layers():
    plain, fast = pair(row)
    x = images()
    for net in (plain, fast):
        net.eval()
    middle = plain[:5](x)
    with fastdense_warnings():
        assert torch.equal(fast[:5](x), middle)
    assert fused_calls(fast[5:], middle) == [(3, "none")]
    assert_same(step(fast[5:], middle.detach()), step(plain[5:], middle.detach()))


def test_dropout_at_the_end_of_a_sequence():
    _, fast = pair(row, drop=0.5)
    x = images()
    assert not torch.equal(fast(x), fast(x))
    assert fused_calls(fast, x) == [(3, "none")]
    assert torch.equal(fast.eval()(x), fast(x))


def test_compile_a_sequence_that_ends_with_layers():
    plain, fast = pair(row)
    x = images()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    assert_same(step(fast, x, run=compiled), step(plain, x))


# --- what a trial leaves alone --------------------------------------------------------------------------


def test_a_trial_changes_nothing():
    model = net()
    before = copy.deepcopy(model.state_dict())
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    grads = [p.requires_grad for p in model.parameters()]
    seen: list[str] = []
    model.dense1.register_forward_hook(lambda *_: seen.append("called"))
    fastdense.convert(model.eval())
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert not seen and not any(module.training for module in model.modules())


def test_report_leaves_a_plain_model_as_it_is():
    model = net()
    before = [(type(m), sorted(vars(m))) for m in model.modules()]
    assert {row.reason for row in fastdense.report(model).rows} == {"not converted: call fastdense.convert(model)"}
    assert [(type(m), sorted(vars(m))) for m in model.modules()] == before


def test_one_trial_for_many_steps(monkeypatch):
    tried = []
    monkeypatch.setattr(inferred_layers, "double_copy", lambda module: tried.append(1) or double_copy(module))
    fast = fastdense.convert(net())
    assert len(tried) == 2
    for mode in (True, False, True):
        step(fast.train(mode), images())
    assert len(tried) == 2


def test_a_forward_that_changes_what_its_code_reads():
    log, forward = [], Layer.forward

    class Logging(Layer):
        def forward(self, x):
            log.append(x.shape)
            return forward(self, x)

    model = net(of(Logging))
    with fastdense_warnings() as messages:
        fastdense.convert(model)
    assert len(messages) == 2
    assert all("its forward changes what its code reads" in message for message in messages)


def test_gradient_modes_and_autocast_around_a_conversion():
    for mode in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            fast = fastdense.convert(net())
        assert fused_calls(fast, images()) == FUSED
    with torch.inference_mode():
        fast = fastdense.convert(net())
        assert fused_calls(fast.eval(), images()) == FUSED


# --- what happens later ---------------------------------------------------------------------------------


def test_hooks_inside_are_called_and_the_block_runs_plain():
    plain, fast = pair(net)
    seen: list[int] = []
    handle = fast.dense1[0].conv1.register_forward_hook(lambda *_: seen.append(1))
    x = images()
    with one_warning("dense1", "0.conv1 has hooks"):
        assert_same(step(fast, x), step(plain, x))
    assert seen
    handle.remove()
    assert fused_calls(fast, x) == FUSED


class Doubling(Layer):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_layer_of_another_class_is_noticed():
    def change(model: nn.Module) -> None:
        model.dense2[1].__class__ = Doubling

    plain, fast = pair(net, change=change, when="after")
    x = images()
    with one_warning(
        "dense2 runs as plain modules",
        "its results differ from those of a dense block: norm, activation and convolution",
    ):
        for _ in range(2):
            assert_same(step(fast, x), step(plain, x))


def test_other_arguments_than_one_tensor_run_the_own_code():
    class Flexible(Collecting):
        def forward(self, x, scale=1.0):
            return super().forward(torch.cat(x, 1) if isinstance(x, list) else x) * scale

    plain, fast = pair(lambda: randomise(Flexible(2).double()))
    x = torch.randn(2, C0, 6, 7, dtype=torch.float64)
    halves = list(x.split(C0 // 2, 1))
    assert fused_calls(fast, x) == [(2, "none")]
    plain(x)
    for arguments, named in (([halves], {}), ([x, 3.0], {}), ([x], {"scale": 3.0}), ([], {"x": x})):
        torch.testing.assert_close(fast(*arguments, **named), plain(*arguments, **named))


def test_an_attribute_that_comes_later_needs_no_trial():
    """FSDP marks every module; in a sharded model there is nothing to try."""
    _, fast = pair(net)
    for module in fast.modules():
        module._is_marked = True
    outcome = fast.dense1._fastdense.outcome
    assert fused_calls(fast, images()) == FUSED
    assert fast.dense1._fastdense.outcome is outcome


def test_parts_of_a_converted_sequence():
    plain, fast = pair(lambda: randomise(plain_sequence(3).double()))
    x = torch.randn(2, C0, 6, 7, dtype=torch.float64)
    for count in (2, 1):
        assert_same(step(fast[:count], x), step(plain[:count], x))
        assert fused_calls(fast[:count], x) == [(count, "none")]
        plain[:count](x)
    with one_warning("it has no layers"):
        assert torch.equal(fast[:0](x), x)


def test_a_residual_around_a_dense_sequence_runs_it_fused():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = plain_sequence(2)

        def forward(self, x):
            return self.body(x) + F.pad(x, (0, 0, 0, 0, 0, 2 * K))

    plain, fast = pair(lambda: randomise(Residual().double()))
    x = torch.randn(2, C0, 6, 7, dtype=torch.float64)
    assert_same(step(fast, x), step(plain, x))
    assert [row.name for row in fastdense.report(fast).rows] == ["body"]
    assert fused_calls(fast, x) == [(2, "none")]


# --- timm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "options"),
    [
        ("densenetblur121d", (6, 12, 24, 16), {}),
        ("densenetblur121d", (6, 12, 24, 16), {"aa_stem_only": False}),
        ("densenet264d", (6, 12, 64, 48), {}),
    ],
)
def test_timm_nets_of_the_d_variants(name, layers, options):
    """One net in turn plain and converted: two of this size would take more memory than the test is worth."""
    model = randomise(timm.create_model(name, num_classes=5, **options).double())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    buffers = [buffer.clone() for buffer in model.buffers()]
    expected = [step(model.train(mode), x) for mode in (True, False)]
    for buffer, old in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(old)
    with fastdense_warnings() as messages:
        fastdense.convert(model)
    transitions = [f"features.transition{at}" for at in (1, 2, 3)]
    assert [message.split()[1] for message in messages] == (transitions if options else [])
    assert all("pool is a BlurPool2d, not an average pool" in message for message in messages)
    rows = fastdense.report(model).rows
    assert [(row.layers, row.runs) for row in rows if row.kind == "block"] == [(count, "fused") for count in layers]
    assert [row.runs for row in rows if row.kind == "transition"] == ["plain" if options else "fused"] * 3
    for mode, plain in zip((True, False), expected, strict=True):
        assert_same(step(model.train(mode), x), plain)

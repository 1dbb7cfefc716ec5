# SPDX-License-Identifier: Apache-2.0
"""Dense blocks of any layers on a shared buffer: the same modules run on the same values, so the bits are the same."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastdense
from fastdense.fusion.shared_buffer.block import SharedBuffer
from fastdense.nn import SharedBufferBlock
from tests.cases.any_layers import C0, FORMS, LAYERS, Block, K, Layer
from tests.cases.converted import assert_bit_equal, assert_same, one_warning, step
from tests.cases.shared_buffer import SCALE, images, is_shared, pair, seeded_step

pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]


# --- the same numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_all_layers_and_forms(layer, form):
    plain, fast = pair(layer=LAYERS[layer], form=form)
    x = images()
    for _ in range(2):
        assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))
    assert_bit_equal(seeded_step(fast.eval(), x), seeded_step(plain.eval(), x))
    with torch.no_grad():
        assert torch.equal(fast(x), plain(x))


@pytest.mark.parametrize("layer", ["squeeze and excite", "drop path and dropout", "depthwise, LayerNorm2d"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_float32_in_both_layouts(layer, layout):
    plain, fast = pair(layer=LAYERS[layer], dtype=torch.float32)
    x = images(dtype=torch.float32).contiguous(memory_format=layout)
    a, b = seeded_step(fast, x), seeded_step(plain, x)
    assert_bit_equal(a, b)
    assert fast(x).stride() == plain(x).stride()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dims", [1, 3])
def test_one_and_three_dimensions(dims, batch):
    plain, fast = pair(dims=dims)
    x = images(dims, batch=batch)
    assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))


@pytest.mark.parametrize("layer", ["squeeze and excite", "depthwise, LayerNorm2d"])
def test_autocast(layer):
    plain, fast = pair(layer=LAYERS[layer], dtype=torch.float32)
    x = images(dtype=torch.float32)

    def under_autocast(net):
        def run(x):
            with torch.autocast("cpu", torch.bfloat16):
                return net(x)

        return run

    a, b = (seeded_step(net, x, run=under_autocast(net)) for net in (fast, plain))
    assert torch.equal(a["out"], b["out"])
    assert_same(a, b, tolerance=0.02)


def test_autocast_keeps_no_cast_weights_for_others():
    """One that was cast without a graph would take the gradient of whoever reads it next."""
    _, fast = pair(dtype=torch.float32)
    conv = fast[1].layers[0].body[5]
    with torch.autocast("cpu", torch.bfloat16):
        fast(images(dtype=torch.float32))
        out = conv(torch.randn(2, 8, 4, 4))
    (grad,) = torch.autograd.grad(out.float().square().sum(), conv.weight)
    assert grad.abs().sum() > 0


def test_frozen_parameters_and_an_input_without_gradient():
    plain, fast = pair()
    x = images()
    for net in (plain, fast):
        net[0].requires_grad_(False)
        net[1].layers[0].requires_grad_(False)
        net[1].layers[2].scale.requires_grad_(False)
        net[1].layers[1].body[0].eval()
    for inner in (0, 1):
        made = []
        for net in (plain, fast):
            net.zero_grad()
            net[inner:](net[:inner](x)).square().sum().backward()
            made.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
        assert made[0].keys() == made[1].keys() and len(made[0]) > 10
        assert_bit_equal(made[1], made[0])
    assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))
    for net in (plain, fast):
        net.requires_grad_(False)
    assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))
    assert not fast(x).requires_grad


def test_a_parameter_that_no_layer_reads_has_no_gradient():
    def unread():
        block = Block()
        block.layers[1].unread = nn.Parameter(torch.ones(3))
        return block

    plain, fast = pair(unread)
    x = images()
    assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))
    assert fast[1].layers[1].unread.grad is None


def test_a_module_of_several_layers():
    def tied():
        block = Block()
        block.layers[2].excite = block.layers[0].excite
        return block

    plain, fast = pair(tied)
    x = images()
    assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))


def test_empty_batch_in_eval_mode():
    plain, fast = pair()
    x = images(batch=0)
    assert_bit_equal(seeded_step(fast.eval(), x), seeded_step(plain.eval(), x))


def test_a_block_under_a_checkpoint():
    for reentrant in (True, False):
        plain, fast = pair(layer=LAYERS["drop path and dropout"])
        x = images()
        fast_run, plain_run = (functools.partial(checkpoint, net, use_reentrant=reentrant) for net in (fast, plain))
        assert_bit_equal(seeded_step(fast, x, run=fast_run), seeded_step(plain, x, run=plain_run))


def test_compiled_code_runs_the_plain_modules():
    plain, fast = pair()
    x = images()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    assert_same(step(fast, x, run=compiled), step(plain, x))


def test_copies_pickles_and_second_conversions():
    plain, fast = pair()
    x = images()
    fast(x).sum().backward()
    fast.load_state_dict(plain.state_dict())
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fastdense.convert(fast, memory="min")):
        assert is_shared(twin)
        assert_bit_equal(seeded_step(twin, x), seeded_step(copy.deepcopy(plain), x))
    assert list(fast.state_dict()) == list(plain.state_dict())
    fastdense.restore(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]
    assert [sorted(vars(m)) for m in fast.modules()] == [sorted(vars(m)) for m in plain.modules()]


def test_two_passes_before_one_backward_and_a_kept_graph():
    plain, fast = pair(layer=LAYERS["drop path and dropout"])
    made = []
    for net in (plain, fast):
        torch.manual_seed(3)
        x = images().requires_grad_()
        first, second = net(x), net(2 * x)
        first.square().sum().backward(retain_graph=True)
        torch.rand(5)
        second.square().sum().backward()
        first.sum().backward()
        made.append({name: p.grad for name, p in net.named_parameters()} | {"input": x.grad})
    assert_bit_equal(made[1], made[0])


def test_hooks_of_parameters_see_one_gradient():
    plain, fast = pair()
    seen = {"plain": [], "fast": []}
    for name, net in (("plain", plain), ("fast", fast)):
        net[1].layers[0].scale.register_hook(lambda grad, name=name: seen[name].append(grad))
        step(net, images())
    assert len(seen["fast"]) == len(seen["plain"]) == 1


def test_modes_that_change_before_the_backward_pass():
    plain, fast = pair(layer=LAYERS["drop path and dropout"])
    made = []
    for net in (plain, fast):
        torch.manual_seed(3)
        net.train()
        out = net(images())
        net.eval()
        out.square().sum().backward()
        assert not any(module.training for module in net.modules())
        made.append({name: p.grad for name, p in net.named_parameters()} | dict(net.named_buffers()))
    assert_bit_equal(made[1], made[0])


def test_running_statistics_of_a_frozen_norm_are_those_of_the_forward_pass():
    _, fast = pair()
    x, made = images(), []
    for moves in (False, True):
        fast.zero_grad()
        out = fast.eval()(x)
        if moves:
            with torch.no_grad():
                fast.train()(x + 3)
            fast.eval()
        out.square().sum().backward()
        made.append({name: p.grad for name, p in fast.named_parameters()})
    assert_bit_equal(*made)


# --- errors, never a wrong number in silence ------------------------------------------------------------


def test_a_step_of_the_optimizer_before_the_backward_pass_raises():
    _, fast = pair()
    out = fast(images())
    with torch.no_grad():
        fast[1].layers[0].scale.add_(1)
    with pytest.raises(RuntimeError, match="a parameter has changed since the forward pass"):
        out.sum().backward()


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.layers[0].body, "5", nn.Conv2d(8, K, 3, padding=1).double()),
        lambda block: setattr(block.layers[0].body[1], "inplace", False),
        lambda block: block.layers[1].register_forward_hook(lambda *_: None),
    ],
)
def test_other_modules_before_the_backward_pass_raise(change):
    _, fast = pair()
    out = fast(images())
    change(fast[1])
    with pytest.raises(RuntimeError, match="has changed since the forward pass"):
        out.sum().backward()


FACTOR = 1.0


class OfAGlobal(Layer):
    def forward(self, x):
        return super().forward(x) * FACTOR


def test_another_global_variable_before_the_backward_pass_raises(monkeypatch):
    _, fast = pair(layer=OfAGlobal)
    out = fast(images())
    monkeypatch.setattr(f"{__name__}.FACTOR", 2.0)
    with pytest.raises(RuntimeError, match=r"a variable that the code of a .*Block reads has changed since"):
        out.sum().backward()


def test_an_output_that_is_changed_in_place_raises():
    _, fast = pair()
    out = fast(images())
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_batch_of_gradients_raises():
    _, fast = pair()
    x = images().requires_grad_()
    out = fast(x)
    with pytest.raises(RuntimeError, match="takes no batch of gradients"):
        torch.autograd.grad(out, x, torch.ones(2, *out.shape).to(out), is_grads_batched=True)


def test_double_backward_raises():
    _, fast = pair()
    x = images().requires_grad_()
    (grad,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a block on a shared buffer: double backward is not supported"):
        grad.sum().backward()


class Failing(Layer):
    fails = ""

    def forward(self, x):
        if self.fails == "forward" or (self.fails == "backward" and torch.is_grad_enabled()):
            raise ValueError("no")
        return super().forward(x)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_layer_that_fails_leaves_what_the_plain_one_leaves(when):
    plain, fast = pair(layer=Failing)
    x = images()
    for net in (plain, fast):
        net[1].layers[1].fails = when if net is fast else "forward"
        with pytest.raises(ValueError, match="no"):
            net(x).sum().backward()
        net[1].layers[1].fails = ""
    expected = dict(plain.named_buffers())
    if when == "backward":
        plain, _ = pair(layer=Failing)
        plain(x)
        expected = dict(plain.named_buffers())
    assert_bit_equal(dict(fast.named_buffers()), expected)
    assert all(type(p) is nn.Parameter for p in fast.parameters())
    assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))


# --- memory ---------------------------------------------------------------------------------------------


def test_the_output_is_all_that_is_saved():
    _, fast = pair(dtype=torch.float32, layers=5)
    made = fastdense.report(fast, (3, 16, 16))
    outputs = (3 + C0 + 5 * K) * 16 * 16 * 4  # and the input of the convolution in front of it
    assert made.kept_bytes == outputs
    assert made.plain_bytes > 9 * outputs


class Convolutions(TorchDispatchMode):
    """Counts convolutions, and concatenations of as many channels as the block has."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = self.joins = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.convolutions += func is torch.ops.aten.convolution.default
        self.joins += func is torch.ops.aten.cat.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["tensor", "joins", "joins in front"])
def test_the_second_run_does_not_make_the_result_again(form):
    _, fast = pair(layer=LAYERS["shuffle"], form=form)
    out = fast(images())
    with Convolutions() as counted:
        out.sum().backward()
    assert (counted.convolutions, counted.joins) == (3, 0)  # the first of two in each layer


# --- the module for new networks ------------------------------------------------------------------------


def own_layer(channels: int, growth: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.GroupNorm(2, channels), nn.Conv2d(channels, growth, 3, padding=1))


def test_shared_buffer_block():
    torch.manual_seed(0)
    block = SharedBufferBlock([own_layer(4, 2), own_layer(6, 4), nn.Dropout(0.5), own_layer(20, 2)]).double()
    plain = fastdense.restore(copy.deepcopy(block))
    assert not isinstance(plain, SharedBuffer)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    assert_bit_equal(seeded_step(block, x), seeded_step(plain, x))
    assert_bit_equal(seeded_step(block.eval(), x), seeded_step(plain.eval(), x))
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), fastdense.convert(plain)):
        assert type(twin) is SharedBufferBlock
        assert [(row.runs, row.reason) for row in fastdense.report(twin).rows] == [("shared buffer", "")]
        assert_bit_equal(seeded_step(twin, x), seeded_step(block, x))


@pytest.mark.parametrize("at", [lambda block: block, lambda block: nn.Sequential(block, nn.Conv2d(12, 2, 1))])
def test_shared_buffer_block_with_fused_blocks_in_it(at):
    """A second run of a fused block would draw other dropout masks than the first."""
    torch.manual_seed(0)
    inner = fastdense.nn.DenseBlock(2, 4, 4, drop_rate=0.5)
    block = SharedBufferBlock([at(inner), nn.GroupNorm(1, 16 if at(inner) is inner else 6)]).double()
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)

    def run(x):
        torch.manual_seed(1)
        return block(x).square().sum()

    with one_warning("is fused itself"):
        run(x.requires_grad_())
    (grad,) = torch.autograd.grad(run(x), x)
    along, step = torch.randn_like(x), 1e-6
    with torch.no_grad():
        ahead, behind = x + step * along, x - step * along
    difference = (run(ahead.requires_grad_()) - run(behind.requires_grad_())).item() / (2 * step)
    assert (grad * along).sum().item() == pytest.approx(difference, rel=1e-6)


def test_shared_buffer_block_refuses_captured_tensors_in_the_backward_pass():
    class Captures(nn.Module):
        def forward(self, x):
            return x[:, :1] * SCALE

    block = SharedBufferBlock([Captures(), Captures()]).double()
    out = block(torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True))
    with pytest.raises(RuntimeError, match="Captures reads a tensor that requires grad and is none of its parameters"):
        out.sum().backward()


def test_shared_buffer_block_needs_layers():
    with pytest.raises(ValueError, match="SharedBufferBlock: expected layers to have at least one module, got none"):
        SharedBufferBlock([])

# SPDX-License-Identifier: Apache-2.0
"""Stems of converted networks: which run norm, ReLU and max pool as one operator, with the same numbers."""

import contextlib
import pickle
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from timm.layers import ConvNormAct
from timm.models.dpn import DPN
from torch import Tensor, nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastdense
from tests.cases.converted import (
    NETS,
    assert_bit_equal,
    assert_same,
    images,
    pair,
    randomise,
    step,
    timm_net,
    torchvision_net,
)
from tests.cases.monai import monai_net, volume
from tests.cases.random_block import relative

pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]


class StemCalls(TorchDispatchMode):
    """Counts calls of the operator, forward and backward."""

    forward = backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is torch.ops.fastdense.norm_relu_max_pool.default
        self.backward += func is torch.ops.fastdense._norm_relu_max_pool_backward.default
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def stem_calls(forward: int, backward: int = 0) -> Iterator[None]:
    with StemCalls() as calls:
        yield
    assert (calls.forward, calls.backward) == (forward, backward)


def stem_of(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    return net.features.norm0, net.features.pool0


def front(net: nn.Module) -> nn.Sequential:
    """The stem alone of a converted or plain torchvision net, run by what runs the net's."""
    features = net.features
    part = type(features)()
    for name in ("norm0", "relu0", "pool0"):
        part.add_module(name, getattr(features, name))
    return part


def set_pool(pool: nn.Module) -> Callable[[nn.Module], None]:
    return lambda net: setattr(net.features, "pool0", pool)


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_nets(make, layout, mode):
    plain, fast = pair(make)
    assert list(plain.state_dict()) == list(fast.state_dict())
    for net in (plain, fast):
        net.to(memory_format=layout).train(mode == "train")
        if mode == "frozen":
            for parameter in stem_of(net)[0].parameters():
                parameter.requires_grad_(False)
    x = images(size=32).to(memory_format=layout)
    for _ in range(2):
        with stem_calls(1, 1):
            actual = step(fast, x)
        assert_same(actual, step(plain, x))
    with torch.no_grad(), stem_calls(1):
        fast(x)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_monai_nets(dims):
    plain, fast = pair(monai_net, dims=dims)
    x = volume(dims)
    with stem_calls(1, 1):
        actual = step(fast, x)
    assert_same(actual, step(plain, x))


def test_own_models():
    net = fastdense.models.create("densenet121", num_classes=3)
    with torch.no_grad(), stem_calls(1):
        net.eval()(torch.randn(1, 3, 64, 64))
    fastdense.restore(net)
    with torch.no_grad(), stem_calls(0):
        net(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 1, 1),
        nn.MaxPool2d((3, 2), (2, 1), (1, 0)),
        nn.MaxPool2d(15, 2, 7),
    ],
    ids=str,
)
def test_other_pools_run_in_the_operator(pool):
    plain, fast = (front(net) for net in pair(change=set_pool(pool)))
    x = torch.randn(2, 8, 20, 19, dtype=torch.float64)
    with stem_calls(1, 1):
        actual = step(fast, x)
    assert_same(actual, step(plain, x))


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, 1, dilation=2),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d(16, 2, 8),
    ],
    ids=str,
)
def test_pools_that_the_operator_does_not_know_are_run_again(pool):
    plain, fast = (front(net) for net in pair(change=set_pool(pool)))
    x = torch.randn(2, 8, 20, 19, dtype=torch.float64)
    with stem_calls(0):
        actual = step(fast, x)
    assert_same(actual, step(plain, x))


def test_indices_are_returned():
    plain, fast = (front(net) for net in pair(change=set_pool(nn.MaxPool2d(2, return_indices=True))))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with stem_calls(0):
        assert all(torch.equal(a, b) for a, b in zip(fast(x), plain(x), strict=True))


def test_torch_refuses_too_much_padding():
    _, fast = pair(change=set_pool(nn.MaxPool2d(2, 2, 2)))
    with pytest.raises(RuntimeError, match="pad"):
        front(fast)(torch.randn(2, 8, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize("name", ["norm0", "relu0", "pool0"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_called(name, register):
    plain, fast = pair()
    logs = [], []
    for net, log in zip((plain, fast), logs, strict=True):
        getattr(getattr(net.features, name), register)(lambda *args, log=log: log.append(len(args)))
    x = images(size=32)
    with stem_calls(0):
        actual = step(fast, x)
    assert_same(actual, step(plain, x))
    assert logs[0] == logs[1] and len(logs[0]) == 1


def test_a_hook_on_the_activation_inside_a_norm_is_called():
    plain, fast = pair(timm_net)
    seen = []
    fast.features.norm0.act.register_forward_hook(lambda *_: seen.append(1))
    x = images(size=32)
    with stem_calls(0):
        actual = step(fast, x)
    assert seen == [1]
    assert_same(actual, step(plain, x))


def test_global_hooks_and_parametrizations_are_seen():
    _, fast = pair()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    with stem_calls(0):
        front(fast)(x)
    handle.remove()
    with stem_calls(1):
        front(fast)(x)
    nn.utils.parametrize.register_parametrization(fast.features.norm0, "weight", nn.Identity())
    with stem_calls(0):
        front(fast)(x)


NORM_CHANGES = {
    "momentum None": lambda norm: setattr(norm, "momentum", None),
    "momentum 0": lambda norm: setattr(norm, "momentum", 0.0),
    "large eps": lambda norm: setattr(norm, "eps", 0.5),
}


@pytest.mark.parametrize("change", NORM_CHANGES.values(), ids=NORM_CHANGES)
def test_settings_of_the_norm(change):
    plain, fast = pair(change=lambda net: change(net.features.norm0))
    plain, fast = front(plain), front(fast)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    for _ in range(2):
        with stem_calls(1, 1):
            actual = step(fast, x)
        assert_same(actual, step(plain, x))


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_norms_without_parameters_or_statistics(options, training):
    plain, fast = pair(change=lambda net: setattr(net.features, "norm0", nn.BatchNorm2d(8, **options).double()))
    plain, fast = front(plain).train(training), front(fast).train(training)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    with stem_calls(1, 1):
        actual = step(fast, x)
    assert_same(actual, step(plain, x))


@pytest.mark.parametrize("training", [True, False])
def test_synchronised_norms_of_one_process(training):
    plain, fast = (nn.SyncBatchNorm.convert_sync_batchnorm(front(net)).train(training) for net in pair())
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    with stem_calls(1, 1):
        actual = step(fast, x)
    assert_same(actual, step(plain, x))


def test_other_norms_run_plain():
    _, fast = pair(change=lambda net: setattr(net.features, "norm0", nn.InstanceNorm2d(8)))
    with stem_calls(0):
        front(fast)(torch.randn(2, 8, 9, 9, dtype=torch.float64))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_statistics_move_once_under_a_checkpoint(use_reentrant):
    plain, fast = (front(net) for net in pair())
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    actual = step(fast, x, lambda x: checkpoint(fast, x, use_reentrant=use_reentrant))
    assert fast.norm0.num_batches_tracked == 1
    assert_same(actual, step(plain, x))


def test_statistics_stay_after_an_error():
    _, fast = pair()
    before = {name: b.clone() for name, b in fast.named_buffers()}
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        front(fast)(torch.randn(1, 8, 1, 1, dtype=torch.float64))
    assert all(torch.equal(b, before[name]) for name, b in fast.named_buffers())


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    plain, fast = (front(net).train(training) for net in pair())
    x = torch.randn(0, 8, 9, 9, dtype=torch.float64)
    assert_same(step(fast, x), step(plain, x))


def test_two_steps_before_one_backward():
    plain, fast = (front(net) for net in pair())
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    y = torch.randn(3, 8, 7, 9, dtype=torch.float64)

    def both(net: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: net(x).sum() * net(y).sum() + net(x).square().sum()

    assert_same(step(fast, x, both(fast)), step(plain, x, both(plain)))


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")
@pytest.mark.parametrize("options", [{}, {"dynamic": True}], ids=str)
def test_compiles_to_one_graph(options):
    plain, fast = (front(net) for net in pair())
    backend = AotEagerAndRecordGraphs()
    compiled = torch.compile(fast, fullgraph=True, backend=backend, **options)
    for batch in (2, 3):
        x = torch.randn(batch, 8, 9, 9, dtype=torch.float64)
        assert_same(step(fast, x, compiled), step(plain, x))
    assert all("fastdense.norm_relu_max_pool" in graph.code for graph in backend.fw_graphs)
    assert all("fastdense._norm_relu_max_pool_backward" in graph.code for graph in backend.bw_graphs)


def test_export_traces_the_plain_modules():
    _, fast = pair()
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    program = torch.export.export(front(fast).eval(), (x,))
    assert "fastdense" not in str(program.graph)
    assert torch.equal(program.module()(x), fastdense.restore(front(fast).eval())(x))


def test_derivatives_that_need_plain_modules():
    _, fast = pair()
    net = front(fast).eval()
    x, t = torch.randn(2, 2, 8, 9, 9, dtype=torch.float64)
    _, moved = torch.func.jvp(net, (x,), (t,))
    eps = 1e-6
    torch.testing.assert_close(moved, (net(x + eps * t) - net(x - eps * t)) / (2 * eps), rtol=1e-6, atol=1e-6)
    with stem_calls(0):
        torch.func.vmap(net)(torch.randn(3, 2, 8, 9, 9, dtype=torch.float64))


@pytest.mark.parametrize("dims", [2, 3])
def test_autocast(dims):
    plain, fast = (front(net.float()) for net in pair(torchvision_net if dims == 2 else monai_net))
    x = torch.randn(2, 8, *[10] * dims).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), stem_calls(1):
        made, expected = fast(x), plain(x)
    assert made.dtype == expected.dtype
    torch.testing.assert_close(made, expected)


def test_kept_for_backward():
    """The input, a byte a pooled value, and eight numbers a channel."""
    _, fast = pair()
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(2, 8, 16, 16, dtype=torch.float64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        front(fast)(x)
    assert sum(kept.values()) <= 8 * x.numel() + 2 * 8 * 8 * 8 + 8 * 8 * 8


def test_pickles_and_stays_deterministic():
    _, fast = pair()
    x = images(size=32)
    again = pickle.loads(pickle.dumps(fast))
    assert_bit_equal(step(again, x), step(fast, x))


def test_frozen_statistics_that_move_before_backward():
    """What backward reads is what forward read."""
    nets = [randomise(front(net)).eval() for net in pair()]
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    results = []
    for index, net in enumerate(nets):
        y = x.clone().requires_grad_()
        net.load_state_dict(nets[0].state_dict())
        out = net(y)
        if index == 1:
            with torch.no_grad():
                net.norm0.running_var.mul_(3)
        out.sum().backward()
        results.append(y.grad)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


# --- a convolution, norm and activation in one module, as dual path networks have them -------------------


class Subclass(ConvNormAct):
    """With code of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5


def dual_path_net(change: Callable[[nn.Module], None] = lambda net: None, **options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"k_sec": (1, 1, 1, 1), "inc_sec": (4, 4, 4, 4), "k_r": 8, "groups": 2, "num_init_features": 6}
    net = DPN(num_classes=5, small=True, **sizes, **options)
    change(net)
    return randomise(net.double())


def own_dual_path_net(**options: object) -> nn.Module:
    sizes = {"stem_channels": 6, "width": 8, "groups": 2, "blocks": (1, 1), "growth_rates": (4, 4)}
    net = fastdense.models.DPN(residual_channels=8, num_classes=5, **sizes, **options)
    return randomise(fastdense.restore(net).double())


@pytest.mark.parametrize("make", [dual_path_net, own_dual_path_net])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_a_convolution_norm_and_activation_in_one_module(make, layout, training):
    plain, fast = pair(make)
    for net in (plain, fast):
        net.to(memory_format=layout).train(training)
    x = images(size=32).to(memory_format=layout)
    with stem_calls(1, 1):
        actual = step(fast, x)
    assert_same(actual, step(plain, x))
    with torch.inference_mode(), stem_calls(1):
        assert relative(fast.eval()(x), plain.eval()(x)) <= 1e-10


@pytest.mark.parametrize("name", ["conv1_1", "conv1_1.conv", "conv1_1.bn", "conv1_1.bn.act", "conv1_pool"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_a_convolution_norm_and_activation_are_called(name, register):
    plain, fast = pair(dual_path_net)
    logs = [], []
    for net, log in zip((plain, fast), logs, strict=True):
        getattr(net.features.get_submodule(name), register)(lambda *args, log=log: log.append(len(args)))
    x = images(size=32)
    with stem_calls(int(name == "conv1_1.conv"), int(name == "conv1_1.conv")):
        actual = step(fast, x)
    assert_same(actual, step(plain, x))
    assert logs[0] == logs[1] and len(logs[0]) == 1


def _give_another_class(net: nn.Module) -> None:
    net.features.conv1_1.__class__ = Subclass


def _blur(net: nn.Module) -> None:
    net.features.conv1_1.aa = nn.AvgPool2d(3, 1, 1)


def _exchange_activation(net: nn.Module) -> None:
    net.features.conv1_1.bn.act = nn.SiLU()


def _drop_the_norm(net: nn.Module) -> None:
    net.features.conv1_1.bn = nn.Sequential()


@pytest.mark.parametrize("change", [_give_another_class, _blur, _exchange_activation, _drop_the_norm])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_other_modules_of_a_stem_run_as_they_are(change, after):
    plain, fast = pair(dual_path_net if after else partial(dual_path_net, change))
    if after:
        change(plain), change(fast)
    x = images(size=32)
    with stem_calls(0):
        actual = step(fast, x)
    assert_same(actual, step(plain, x))


def test_code_of_a_stem_that_changes_is_seen(monkeypatch):
    plain, fast = pair(dual_path_net)
    x = images(size=32)
    with stem_calls(1, 1):
        step(fast, x)
    forward = ConvNormAct.forward
    monkeypatch.setattr(ConvNormAct, "forward", lambda self, x: forward(self, x) * 2)
    plain, fast = pair(dual_path_net)
    with stem_calls(0), pytest.warns(UserWarning, match=r"ConvNormAct\.forward has been replaced"):
        actual = step(fast, x)
    assert_same(actual, step(plain, x))

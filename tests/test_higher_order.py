# SPDX-License-Identifier: Apache-2.0
"""The general form: integer laws, numbers of modules, and the networks that are special cases."""

import itertools

import pytest
import torch
import torchvision.models.densenet as tv_densenet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdense.nn import DenseBlock, HigherOrderNet
from fastdense.nn.higher_order import SHARING

IDENTITY = nn.Identity()


class Times(nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


class Channels(nn.Module):
    """x[:, begin:end]"""

    def __init__(self, begin: int, end: int | None = None) -> None:
        super().__init__()
        self.slice = slice(begin, end)

    def forward(self, x):
        return x[:, self.slice]


def norm(channels: int, like: nn.BatchNorm2d | None = None, part: slice = slice(None)) -> nn.BatchNorm2d:
    """A norm with random parameters, or with a slice of another's."""
    made = nn.BatchNorm2d(channels).double()
    with torch.no_grad():
        made.weight.copy_(like.weight[part] if like is not None else torch.rand(channels) + 0.5)
        made.bias.copy_(like.bias[part] if like is not None else torch.randn(channels) * 0.3)
    return made


def conv(c: int, k: int, size: int = 1, weight=None, bias: bool = False) -> nn.Conv2d:
    made = nn.Conv2d(c, k, size, padding=size // 2, bias=bias).double()
    if weight is not None:
        with torch.no_grad():
            made.weight.copy_(weight)
    return made


def image(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 5, 4, dtype=torch.float64)


def states_of(net: HigherOrderNet, x: torch.Tensor):
    """Of the fast path and of the reference."""
    return net.states(x), net.reference(x)


def integers(net: HigherOrderNet, start: int = 1):
    fast, slow = states_of(net, torch.tensor(start))
    assert [int(h) for h in fast] == [int(h) for h in slow]
    return [int(h) for h in fast]


def test_order_two_is_fibonacci():
    net = HigherOrderNet(IDENTITY, IDENTITY, 10, "lag", order=2)
    assert integers(net) == [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89]


@pytest.mark.parametrize("sharing", ["none", "source", "lag"])
def test_all_ones_double_at_every_step(sharing):
    assert integers(HigherOrderNet(IDENTITY, IDENTITY, 8, sharing)) == [1] + [2**k for k in range(8)]


def test_shared_sources_multiply():
    """r^{k+1} = r^k (1 + c_k) with r^1 = c_0."""
    factors = (2, 3, 5, 7, 11)
    net = HigherOrderNet(lambda k, t: Times(factors[t]), IDENTITY, 5, "source")
    assert integers(net) == [1, 2, 8, 48, 384, 4608]


def test_dual_sums_both_paths():
    """h^k = sum of 2 h^t + 10 * sum of h^t."""
    net = HigherOrderNet(lambda k, t: Times(2), IDENTITY, 3, "dual", v=IDENTITY, w=lambda k: Times(10))
    assert integers(net) == [1, 12, 12 * 13, 12 * 169]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_numbers_of_modules(steps):
    def made(sharing, **arguments):
        return len(HigherOrderNet(lambda k, t: Times(k), IDENTITY, steps, sharing, **arguments).f)

    assert made("none") == made("dual", v=IDENTITY) == steps * (steps + 1) // 2
    assert made("source") == steps
    assert made("lag") == steps
    assert made("lag", order=2) == min(2, steps)


def test_factories_are_asked_once_for_each_module():
    asked = []
    arguments = {"none": {}, "source": {}, "lag": {"order": 2}, "dual": {"v": IDENTITY}}
    expected = {
        "none": [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)],
        "source": [(1, 0), (2, 1), (3, 2)],
        "lag": [(1, 0), (2, 0)],
        "dual": [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)],
    }
    for sharing in SHARING:
        asked.clear()
        HigherOrderNet(lambda k, t: asked.append((k, t)) or Times(1), IDENTITY, 3, sharing, **arguments[sharing])
        assert asked == expected[sharing]


def dense_block_as_general_form(block: nn.Module, c: int, growth: int, layers: int) -> HigherOrderNet:
    def f(k, t):
        layer = getattr(block, f"denselayer{k}")
        part = slice(0, c) if t == 0 else slice(c + (t - 1) * growth, c + t * growth)
        width = part.stop - part.start
        weight = layer.conv1.weight[:, part]
        return nn.Sequential(norm(width, layer.norm1, part), nn.ReLU(), conv(width, len(weight), weight=weight))

    def g(k):
        layer = getattr(block, f"denselayer{k}")
        width = layer.norm2.num_features
        return nn.Sequential(norm(width, layer.norm2), nn.ReLU(), conv(width, growth, 3, layer.conv2.weight))

    return HigherOrderNet(f, g, layers, "none")


@pytest.mark.parametrize("make", [tv_densenet._DenseBlock, None], ids=["torchvision", "fastdense"])
def test_dense_block_is_unshared(make):
    c, growth, layers = 5, 3, 4
    block = make(layers, c, 4, growth, 0.0) if make else DenseBlock(layers, c, growth)
    block = block.double().train()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    net = dense_block_as_general_form(block, c, growth, layers).train()
    x = image(c)
    for states in states_of(net, x):
        torch.testing.assert_close(torch.cat(states, 1), block(x), rtol=0, atol=1e-12)


def residual_functions(channels: int, blocks: int):
    """Halves g and f of pre-activation blocks r + f(g(r))."""
    g = [nn.Sequential(norm(channels), nn.ReLU(), conv(channels, 6, 3)).eval() for _ in range(blocks)]
    f = [nn.Sequential(norm(6), nn.ReLU(), conv(6, channels, 3)).eval() for _ in range(blocks)]
    return f, g


def test_residual_chain_is_shared_by_source():
    blocks = 4
    f, g = residual_functions(3, blocks)
    net = HigherOrderNet(
        lambda k, t: IDENTITY if t == 0 else f[t - 1],
        lambda k: g[k - 1] if k <= blocks else IDENTITY,
        blocks + 1,
        "source",
    ).eval()
    x = image(3)
    r = x
    for inner, outer in zip(g, f, strict=True):
        r = r + outer(inner(r))
    for states in states_of(net, x):
        torch.testing.assert_close(states[-1], r, rtol=0, atol=1e-12)


def test_one_module_for_all_sources_is_a_residual_chain_with_tied_weights():
    (f,), (g,) = residual_functions(3, 1)
    x, parameters = image(6), set()
    for steps in (2, 5):
        net = HigherOrderNet(f, g, steps, "source").eval()
        parameters.add(sum(p.numel() for p in net.parameters()))
        r = f(x)
        for _ in range(steps - 1):
            r = r + f(g(r))
        for states in states_of(net, x):
            torch.testing.assert_close(states[-1], g(r), rtol=0, atol=1e-12)
    assert len(parameters) == 1


def test_recursion_of_drcn_is_order_one():
    """One convolution applied again and again: the number of recursions does not change the parameters."""
    shared = conv(4, 4, 3, bias=True)
    x = image(4)
    parameters = set()
    for recursions in (1, 3, 16):
        net = HigherOrderNet(shared, nn.ReLU(), recursions, "lag", order=1)
        parameters.add(sum(p.numel() for p in net.parameters()))
        expected = [x]
        for _ in range(recursions):
            expected.append(shared(expected[-1]).relu())
        for states in states_of(net, x):
            torch.testing.assert_close(states, expected, rtol=0, atol=1e-12)
    assert parameters == {4 * 4 * 9 + 4}


def test_dual_path_blocks():
    """r = conv_a(act([res | dense])) is a sum over the residual path and over each part of the dense path."""
    bw, first, inc, mid, blocks = 4, 6, 2, 5, 3
    widths = [first + k * inc for k in range(blocks)]
    norms = [norm(bw + width) for width in widths]
    heads = [conv(bw + width, mid, 1) for width in widths]
    tails = [nn.Sequential(norm(mid), nn.ReLU(), conv(mid, mid, 3), nn.ReLU(), conv(mid, bw + inc)) for _ in widths]

    def act(k, part):
        width = part.stop - part.start
        weight = heads[k - 1].weight[:, part]
        return [norm(width, norms[k - 1], part), nn.ReLU(), conv(width, mid, weight=weight)]

    def f(k, t):
        begin = bw if t == 0 else bw + first + (t - 1) * inc
        return nn.Sequential(Channels(bw), *act(k, slice(begin, begin + (first if t == 0 else inc))))

    net = HigherOrderNet(
        f,
        lambda k: tails[k - 1],
        blocks,
        "dual",
        v=Channels(0, bw),
        w=lambda k: nn.Sequential(*act(k, slice(0, bw))),
    )
    x = image(bw + first)
    res, dense = x[:, :bw], x[:, bw:]
    for bn, head, tail in zip(norms, heads, tails, strict=True):
        new = tail(head(bn(torch.cat([res, dense], 1)).relu()))
        res, dense = res + new[:, :bw], torch.cat([dense, new[:, bw:]], 1)
    for states in states_of(net, x):
        torch.testing.assert_close(sum(h[:, :bw] for h in states), res, rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.cat([h[:, bw:] for h in states], 1), dense, rtol=0, atol=1e-12)


def test_two_paths_that_share_nothing_reduce_to_each():
    """Without a dense path, dual is source; without a residual path, it is none."""
    x = image(3)
    f = {key: conv(3, 3, 3) for key in itertools.product(range(1, 5), range(4))}
    zero = Times(0)
    dual = HigherOrderNet(zero, nn.Tanh(), 4, "dual", v=lambda t: f[1, t])
    source = HigherOrderNet(lambda k, t: f[1, t], nn.Tanh(), 4, "source")
    torch.testing.assert_close(dual(x), source(x), rtol=0, atol=1e-12)
    dual = HigherOrderNet(lambda k, t: f[k, t], nn.Tanh(), 4, "dual", v=zero)
    none = HigherOrderNet(lambda k, t: f[k, t], nn.Tanh(), 4, "none")
    torch.testing.assert_close(dual(x), none(x), rtol=0, atol=1e-12)


def count_calls(net: nn.Module, classes) -> list[int]:
    calls: list[int] = []
    for module in net.modules():
        if isinstance(module, classes):
            module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_running_sum_calls_each_module_once():
    net = HigherOrderNet(lambda k, t: Times(1), IDENTITY, 6, "source")
    calls = count_calls(net, Times)
    net.states(torch.tensor(1))
    assert len(calls) == 6
    net.reference(torch.tensor(1))
    assert len(calls) == 6 + 21


class Products(TorchDispatchMode):
    """Counts convolutions and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_one_product_for_each_step(bias, kind):
    def f(k, t):
        layer = nn.Linear(4, 5, bias).double() if kind == "linear" else conv(4, 5, 3, bias=bias)
        return nn.Sequential(nn.Tanh(), layer) if t else layer

    def g(k):
        return nn.Linear(5, 4).double() if kind == "linear" else conv(5, 4)

    net = HigherOrderNet(f, g, 4, "none")
    x = (torch.randn(3, 4, dtype=torch.float64) if kind == "linear" else image(4)).requires_grad_()
    with Products() as products:
        fast = net.states(x)
    assert products.calls == 4 + 4
    with Products() as products:
        expected = net.reference(x)
    assert products.calls == 10 + 4
    torch.testing.assert_close(fast, expected, rtol=0, atol=1e-12)
    parameters = list(net.parameters())
    made, wanted = (torch.autograd.grad(s[-1].square().sum(), [x, *parameters]) for s in (fast, expected))
    torch.testing.assert_close(made, wanted, rtol=1e-9, atol=1e-9)


def test_layers_that_differ_are_called_one_by_one():
    x = image(4)
    sizes = {0: 1, 1: 3, 2: 3}
    net = HigherOrderNet(lambda k, t: conv(4, 4, sizes[t]), nn.Tanh(), 3)
    torch.testing.assert_close(net.states(x), net.reference(x), rtol=0, atol=1e-12)
    grouped = HigherOrderNet(lambda k, t: nn.Conv2d(4, 4, 1, groups=2).double(), nn.Tanh(), 3)
    torch.testing.assert_close(grouped.states(x), grouped.reference(x), rtol=0, atol=1e-12)


def test_hooks_of_layers_are_called():
    net = HigherOrderNet(lambda k, t: conv(4, 4), nn.Tanh(), 3)
    calls = count_calls(net.f, nn.Conv2d)
    net(image(4))
    assert len(calls) == 6


def test_fast_can_be_turned_off():
    net = HigherOrderNet(lambda k, t: Times(1), IDENTITY, 6, "source", fast=False)
    calls = count_calls(net, Times)
    net(torch.tensor(1))
    assert len(calls) == 21


def test_state_dict_round_trip():
    def make():
        return HigherOrderNet(
            lambda k, t: conv(3, 3), lambda k: norm(3), 3, "dual", v=lambda t: conv(3, 3), w=lambda k: conv(3, 3)
        ).eval()

    one, other, x = make(), make(), image(3)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


def test_compiles_as_one_graph():
    net = HigherOrderNet(lambda k, t: conv(3, 3), nn.Tanh(), 3, "dual", v=lambda t: conv(3, 3))
    x = image(3)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), net(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps to be positive, got 0"),
        ({"sharing": "target"}, r"sharing to be one of \('none', 'source', 'lag', 'dual'\), got 'target'"),
        ({"sharing": "lag", "order": 0}, "order to be positive and sharing to be 'lag', got 0"),
        ({"order": 2}, "order to be positive and sharing to be 'lag', got 2"),
        ({"sharing": "dual"}, "v to be given with sharing 'dual' only, got None"),
        ({"v": IDENTITY}, r"v to be given with sharing 'dual' only, got Identity\(\)"),
        ({"w": IDENTITY}, r"w to be given with sharing 'dual' only, got Identity\(\)"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"HigherOrderNet: expected {message}"):
        HigherOrderNet(**{"f": IDENTITY, "g": IDENTITY, "steps": 3, **arguments})

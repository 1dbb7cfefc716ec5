# SPDX-License-Identifier: Apache-2.0
"""Frozen networks, and changes that thaw them."""

from collections.abc import Callable
from functools import partial

import timm
import torch
from torch import nn

import fastdense
from tests.cases.converted import pair, randomise, timm_net, torchvision_net
from tests.cases.families import Layer
from tests.cases.monai import VOLUMES, monai_net


def hand_written() -> nn.Module:
    layers = nn.Sequential(*(Layer(10 + 6 * i, 6) for i in range(3)))
    return randomise(nn.Sequential(nn.Conv2d(3, 10, 3), layers, nn.BatchNorm2d(28)).double())


def dual_path(**options: object) -> nn.Module:
    sizes = {"k_sec": (2, 2, 2, 2), "inc_sec": (4, 4, 4, 4), "k_r": 8, "groups": 4, "num_init_features": 6}
    return randomise(timm.models.dpn.DPN(num_classes=5, small=True, **{**sizes, **options}).double())


def own_dual_path(**options: float) -> nn.Module:
    sizes = {"stem_channels": 6, "width": 8, "groups": 2, "blocks": (2, 2), "growth_rates": (4, 4)}
    net = fastdense.models.DPN(residual_channels=16, num_classes=5, **sizes, **options)
    return randomise(fastdense.restore(net).double())


def cifar() -> nn.Module:
    return randomise(fastdense.restore(fastdense.models.densenet_cifar(10)).double())


NETS = {
    "torchvision": (torchvision_net, (2, 3, 64, 48)),
    "timm": (timm_net, (3, 3, 64, 48)),
    "MONAI 1-D": (partial(monai_net, 1), VOLUMES[1]),
    "MONAI 3-D": (monai_net, VOLUMES[3]),
    "without bottleneck": (cifar, (2, 3, 32, 32)),
    "hand-written": (hand_written, (2, 3, 11, 12)),
    "dual path": (dual_path, (2, 3, 64, 48)),
    "own dual path": (own_dual_path, (2, 3, 64, 48)),
    "dual path, one channel a group": (partial(dual_path, groups=8), (2, 3, 64, 48)),
    "dual path, groups of the library": (partial(dual_path, k_r=64, groups=1), (2, 3, 64, 48)),
}


def made(name: str = "torchvision"):
    """A plain net in eval mode, the same converted and frozen, and images."""
    make, shape = NETS[name]
    plain, fast = pair(make)
    plain.eval(), fast.eval()
    return plain, fastdense.freeze(fast), torch.randn(shape, dtype=torch.float64)


def frozen_bytes(model: nn.Module) -> int:
    return sum(row.frozen_bytes for row in fastdense.report(model).rows)


def relative(a, b) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
def same(plain, fast, x) -> None:
    assert relative(fast(x), plain(x)) <= 1e-10


def _step(net: nn.Module, make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **options: bool) -> None:
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    make(net.parameters(), 0.1, **options).step()


def _train_and_write(net: nn.Module) -> None:
    """Writes that leave no trace, where training announced them."""
    net.train()
    for parameter in net.parameters():
        parameter.data.mul_(1.5)
    net.eval()


def _load(net: nn.Module, assign: bool = False) -> None:
    net.load_state_dict(
        {k: v + 0.25 if v.is_floating_point() else v for k, v in net.state_dict().items()}, assign=assign
    )


def _swap_data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data = parameter.data * 1.25


# Of any network.
CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "a step": _step,
    "a step, fused": partial(_step, fused=True),
    "a step of Adam, fused": partial(_step, make=torch.optim.Adam, fused=True),
    "a step of Adam, foreach": partial(_step, make=torch.optim.Adam, foreach=True),
    "training, and hidden writes in it": _train_and_write,
    "load_state_dict": _load,
    "load_state_dict(assign=True)": partial(_load, assign=True),
    "other memory": _swap_data,
}


def check_change_is_seen(name: str, change: Callable[[nn.Module], None]) -> None:
    """At the next call, which thaws; then the net may be frozen again."""
    plain, fast, x = made(name)
    before = frozen_bytes(fast)
    same(plain, fast, x)
    for net in (plain, fast):
        change(net)
    same(plain, fast, x)
    assert frozen_bytes(fast) < before
    fastdense.freeze(fast)
    assert frozen_bytes(fast) == before
    same(plain, fast, x)

# SPDX-License-Identifier: Apache-2.0
"""A small plain network of every family that is converted."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import timm.models.densenet as timm_densenet
import torch
import torch.nn.functional as F
import torchvision.models.densenet as tv_densenet
from timm.models.dpn import DPN
from torch import Tensor, nn

import fastdense
from fastdense.models.fc_densenet import FCDenseNet
from tests.cases.converted import randomise


class ResidualDenseBlock(nn.Module):
    """One as BasicSR and its descendants write it."""

    def __init__(self, channels: int = 10, growth: int = 6, layers: int = 3) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels + i * growth, growth, 3, padding=1) for i in range(layers))
        self.fusion = nn.Conv2d(channels + layers * growth, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for conv in self.convs:
            features.append(F.leaky_relu(conv(torch.cat(features, 1)), 0.2))
        return self.fusion(torch.cat(features, 1)) * 0.2 + x


class Layer(nn.Module):
    """One of a hand-written block, without a bottleneck."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


class Family(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    memory: tuple[str, ...] = ("balanced", "min", "recompute")


def _block(drop_rate: float = 0.0) -> nn.Module:
    return tv_densenet._DenseBlock(3, 10, 4, 6, drop_rate)


FAMILIES = {
    "dense block": Family(lambda: nn.Sequential(_block()), (2, 10, 9, 8)),
    "dense block and transition": Family(
        lambda: nn.Sequential(_block(), tv_densenet._Transition(28, 12)), (2, 10, 9, 8)
    ),
    "dense block and norm": Family(lambda: nn.Sequential(_block(), nn.BatchNorm2d(28)), (2, 10, 9, 8)),
    "hand-written block": Family(
        lambda: nn.Sequential(nn.Sequential(*(Layer(10 + 6 * i, 6) for i in range(3)))), (2, 10, 9, 8)
    ),
    "torchvision": Family(lambda: tv_densenet.DenseNet(6, (2, 3), 8, 4, num_classes=5), (2, 3, 64, 48)),
    "timm": Family(lambda: timm_densenet.DenseNet(6, (2, 3), num_classes=5), (2, 3, 64, 48)),
    "dual path network": Family(
        lambda: DPN((2, 2, 2, 2), (8,) * 4, k_r=8, groups=2, num_classes=5, small=True, num_init_features=8),
        (2, 3, 64, 64),
        ("balanced", "min", "reversible", "recompute"),
    ),
    "residual dense block": Family(lambda: nn.Sequential(ResidualDenseBlock()), (2, 10, 9, 8)),
    "RRDBNet": Family(lambda: fastdense.models.create("rrdbnet", blocks=1, width=16), (1, 3, 8, 7)),
    "FC-DenseNet": Family(lambda: FCDenseNet(4, (2, 2), 2, (2, 2), num_classes=3, drop_rate=0.0), (2, 3, 16, 16)),
}
MODES = [(name, memory) for name, family in FAMILIES.items() for memory in family.memory]


def pair(name: str, memory: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The plain network in training, the same converted, and an input; in float64."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    plain = randomise(fastdense.restore(family.make())).double().train()
    return plain, fastdense.convert(copy.deepcopy(plain), memory=memory), torch.randn(family.shape).double()

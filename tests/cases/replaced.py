# SPDX-License-Identifier: Apache-2.0
"""One small network of every family that conversion knows, and the code that makes its numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import monai.networks.nets.densenet as monai_densenet
import timm.layers
import timm.models.densenet as timm_densenet
import timm.models.dpn as timm_dpn
import torch
import torch.nn.functional as F
import torchvision.models.densenet as tv_densenet
from torch import Tensor, nn

import fastdense
from fastdense.plain.dense_block import DenseLayer, PlainDenseBlock
from fastdense.plain.dual_path import NormReluConv, PlainDualPathBlock
from fastdense.plain.residual_dense_block import PlainResidualDenseBlock
from fastdense.plain.sr_dense_block import ConvRelu, PlainSRDenseBlock
from tests.cases.converted import randomise


class Family(NamedTuple):
    """How to make a network and its input; functions whose replacement changes its numbers."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    code: list[tuple[Any, str]]


class OwnLayer(nn.Module):
    """A hand-written dense layer, with a function of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.n1, self.c1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 1, bias=False)
        self.n2, self.c2 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return join(x, self.new(x))

    def new(self, x: Tensor) -> Tensor:
        return self.c2(self.relu(self.n2(self.c1(F.relu(self.n1(x))))))


def join(x: Tensor, new: Tensor) -> Tensor:
    return torch.cat([x, new], 1)


class OwnBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([OwnLayer(6 + 4 * at) for at in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class OwnResidual(nn.Module):
    """A hand-written residual dense block."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(10, 4, 3, padding=1)
        self.c3, self.act = nn.Conv2d(14, 6, 1), nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.c1(x))
        z = self.act(self.c2(torch.cat([x, y], 1)))
        return self.c3(torch.cat([x, y, z], 1)) * 0.2 + x


def stem() -> nn.Module:
    block = tv_densenet._DenseBlock(2, 8, 2, 4, 0.0)
    return nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), block)


def max_pool_transition() -> nn.Module:
    parts = nn.BatchNorm2d(14), nn.ReLU(), nn.Conv2d(14, 6, 1), nn.MaxPool2d(2)
    return nn.Sequential(tv_densenet._DenseBlock(2, 6, 2, 4, 0.0), nn.Sequential(*parts))


def dense(block: nn.Module, transition: nn.Module) -> nn.Module:
    return nn.Sequential(block, transition)


def timm_dual_path() -> nn.Module:
    first = timm_dpn.DualPathBlock(6, 8, 8, 8, 4, 2, "proj")
    return nn.Sequential(first, timm_dpn.DualPathBlock(20, 8, 8, 8, 4, 2, "normal"))


def monai(dims: int) -> nn.Module:
    block = monai_densenet._DenseBlock(dims, 2, 6, 2, 4, 0.0)
    return nn.Sequential(block, monai_densenet._Transition(dims, 14, 7))


def plain(module: nn.Module) -> nn.Module:
    return fastdense.restore(module)


def of(dims: int, *, pool: bool = True) -> list[tuple[Any, str]]:
    """Functions of torch that the modules of a dense network in so many dimensions go through."""
    conv, norm, average = (getattr(nn, f"{name}{dims}d") for name in ("Conv", "BatchNorm", "AvgPool"))
    code = [(conv, "forward"), (conv, "_conv_forward"), (norm, "forward"), (nn.Module, "__call__")]
    code += [(F, f"conv{dims}d"), (F, "batch_norm"), (F, "relu"), (torch, "batch_norm")]
    code += [(nn.ReLU, "forward")]
    return code + ([(average, "forward"), (F, f"avg_pool{dims}d")] if pool else [])


def _family(make: Callable[[], nn.Module], shape: tuple[int, ...], code: list[tuple[Any, str]]) -> Family:
    return Family(lambda: randomise(make().double()), shape, code)


IMAGES, VOLUMES = (2, 6, 8, 8), (2, 6, 4, 4, 4)


FAMILIES = {
    "torchvision": _family(
        lambda: dense(tv_densenet._DenseBlock(2, 6, 2, 4, 0.0), tv_densenet._Transition(14, 7)),
        IMAGES,
        [
            *of(2),
            (tv_densenet._DenseBlock, "forward"),
            (tv_densenet._DenseLayer, "forward"),
            (tv_densenet._DenseLayer, "bn_function"),
            (tv_densenet._Transition, "forward"),
            (torch, "cat"),
        ],
    ),
    "timm": _family(
        lambda: dense(timm_densenet.DenseBlock(2, 6, 2, 4), timm_densenet.DenseTransition(14, 7)),
        IMAGES,
        [
            (nn.Conv2d, "forward"),
            (nn.Conv2d, "_conv_forward"),
            (nn.AvgPool2d, "forward"),
            (F, "conv2d"),
            (F, "batch_norm"),
            (timm.layers.BatchNormAct2d, "forward"),
            (timm_densenet.DenseBlock, "forward"),
            (timm_densenet.DenseLayer, "forward"),
            (timm_densenet.DenseLayer, "bottleneck_fn"),
            (timm_densenet.DenseTransition, "forward"),
        ],
    ),
    "monai": _family(
        lambda: monai(2), IMAGES, [*of(2), (monai_densenet._DenseLayer, "forward"), (nn.Sequential, "forward")]
    ),
    "monai, volumes": _family(lambda: monai(3), VOLUMES, [*of(3), (monai_densenet._DenseBlock, "forward")]),
    "own": _family(
        lambda: plain(dense(fastdense.nn.DenseBlock(2, 6, 4), fastdense.nn.Transition(14, 7))),
        IMAGES,
        [*of(2), (PlainDenseBlock, "forward"), (DenseLayer, "forward"), (DenseLayer, "features")],
    ),
    "timm's dual path": _family(
        timm_dual_path,
        IMAGES,
        [
            (nn.Conv2d, "forward"),
            (nn.Conv2d, "_conv_forward"),
            (F, "conv2d"),
            (F, "batch_norm"),
            (timm.layers.BatchNormAct2d, "forward"),
            (timm_dpn.DualPathBlock, "forward"),
            (timm_dpn.BnActConv2d, "forward"),
        ],
    ),
    "own dual path": _family(
        lambda: plain(fastdense.nn.DualPathStage(2, 6, 8, 8, 4, groups=2)),
        IMAGES,
        [
            *of(2, pool=False),
            (PlainDualPathBlock, "forward"),
            (PlainDualPathBlock, "branch"),
            (NormReluConv, "forward"),
        ],
    ),
    "residual dense": _family(
        lambda: plain(nn.Sequential(fastdense.nn.ResidualDenseBlock(6, 4, 2))),
        IMAGES,
        [
            (nn.Conv2d, "forward"),
            (nn.Conv2d, "_conv_forward"),
            (F, "conv2d"),
            (F, "leaky_relu"),
            (PlainResidualDenseBlock, "forward"),
        ],
    ),
    "hand-written residual dense": _family(
        lambda: nn.Sequential(OwnResidual()),
        IMAGES,
        [(nn.Conv2d, "forward"), (F, "conv2d"), (nn.LeakyReLU, "forward"), (OwnResidual, "forward")],
    ),
    "growing dense": _family(
        lambda: nn.Sequential(PlainSRDenseBlock(6, 4, 3), PlainSRDenseBlock(18, 4, 3)),
        IMAGES,
        [
            (nn.Conv2d, "_conv_forward"),
            (F, "conv2d"),
            (torch, "relu"),
            (PlainSRDenseBlock, "forward"),
            (ConvRelu, "forward"),
        ],
    ),
    "hand-written": _family(
        lambda: nn.Sequential(OwnBlock()),
        IMAGES,
        [*of(2, pool=False), (OwnBlock, "forward"), (OwnLayer, "forward"), (OwnLayer, "new"), (torch, "cat")],
    ),
    "hand-written sequence": _family(
        lambda: nn.Sequential(nn.Sequential(nn.Conv2d(6, 6, 1), *[OwnLayer(6 + 4 * at) for at in range(2)])),
        IMAGES,
        [*of(2, pool=False), (OwnLayer, "forward"), (nn.Sequential, "forward")],
    ),
    "stem": _family(stem, (2, 6, 12, 12), [*of(2, pool=False), (nn.MaxPool2d, "forward"), (F, "max_pool2d")]),
    "max pool": _family(
        max_pool_transition, IMAGES, [*of(2, pool=False), (nn.MaxPool2d, "forward"), (nn.Sequential, "forward")]
    ),
}

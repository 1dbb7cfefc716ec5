# SPDX-License-Identifier: Apache-2.0
"""What :mod:`fastdense.selftest` checks: operators on small tensors beside plain PyTorch, and small networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdense import models, ops, reference
from fastdense._choices import DualPathMemoryMode, MemoryMode, Preset


class Case(NamedTuple):
    """Tensors, and what is computed of them by fastdense and by plain PyTorch; a result is one tensor."""

    inputs: dict[str, Tensor]
    fast: Callable[[dict[str, Tensor]], Tensor]
    plain: Callable[[dict[str, Tensor]], Tensor]


class _Numbers:
    """Random tensors of a fixed seed, independent of torch's own generators."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.made: dict[str, Tensor] = {}

    def normal(self, name: str, *size: int, scale: float = 1.0, shift: float = 0.0) -> str:
        self.made[name] = torch.randn(size, generator=self.generator, dtype=torch.float64) * scale + shift
        return name

    def weight(self, name: str, *size: int) -> str:
        fan = 1
        for n in size[1:]:
            fan *= n
        return self.normal(name, *size, scale=fan**-0.5)

    def norm(self, name: str, channels: int) -> str:
        self.normal(f"{name}.weight", channels, scale=0.2, shift=1.0)
        self.normal(f"{name}.bias", channels, scale=0.2)
        return name


def _norm(t: dict[str, Tensor], name: str, groups: int = 0) -> ops.NormWeights:
    return ops.NormWeights(t[f"{name}.weight"], t[f"{name}.bias"], None, None, 1e-5, groups)


def _dense_block(
    size: tuple[int, ...], memory: MemoryMode, groups: int = 0, act: str = "relu", growth: int = 16
) -> Case:
    """``groups`` of channels share the statistics of each sample; then the 3x3 convolutions have a bias."""
    n, dims = _Numbers(1), len(size)
    channels, width, layers = 24, 4 * growth, 3
    n.normal("input", 2, channels, *size, shift=0.5)
    for at in range(layers):
        n.norm(f"{at}.norm1", channels + at * growth)
        n.weight(f"{at}.conv1", width, channels + at * growth, *[1] * dims)
        n.norm(f"{at}.norm2", width)
        n.weight(f"{at}.conv2", growth, width, *[3] * dims)
        if groups > 0:
            n.normal(f"{at}.bias", growth)
    n.norm("tail", channels + layers * growth)
    n.weight("tail.conv", 16, channels + layers * growth, *[1] * dims)
    if act == "prelu":
        n.normal("slope", 1, shift=0.2, scale=0.1)

    def arguments(t: dict[str, Tensor]) -> tuple[Tensor, list[ops.LayerWeights], ops.TailWeights]:
        activation = ops.Activation(act, weight=t.get("slope"))
        made = [
            ops.LayerWeights(
                _norm(t, f"{at}.norm1", groups),
                t[f"{at}.conv1"],
                _norm(t, f"{at}.norm2", groups),
                t[f"{at}.conv2"],
                activation,
                activation,
                bias2=t.get(f"{at}.bias"),
            )
            for at in range(layers)
        ]
        return t["input"], made, ops.TailWeights(_norm(t, "tail", groups), t["tail.conv"], act=activation)

    def fast(t: dict[str, Tensor]) -> Tensor:
        x, made, tail = arguments(t)
        return ops.dense_block(x, made, tail=tail, memory=memory)[0]

    def plain(t: dict[str, Tensor]) -> Tensor:
        x, made, tail = arguments(t)
        return reference.dense_block(x, made, tail=tail)[0]

    return Case(n.made, fast, plain)


def _dual_path_stage(memory: DualPathMemoryMode, width: int = 32, groups: int = 4, stride: int = 1) -> Case:
    n = _Numbers(2)
    channels, residual, growth, blocks, dense = 24, 32, 8, 2, 16
    n.normal("input", 2, channels, 9, 7, shift=0.5)
    n.norm("projection", channels)
    n.weight("projection.conv", residual + dense, channels, 1, 1)
    for at in range(blocks):
        reads = channels if at == 0 else residual + dense + at * growth
        n.norm(f"{at}.a", reads)
        n.weight(f"{at}.conv_a", width, reads, 1, 1)
        n.norm(f"{at}.b", width)
        n.weight(f"{at}.conv_b", width, width // groups, 3, 3)
        n.norm(f"{at}.c", width)
        n.weight(f"{at}.conv_c", residual + growth, width, 1, 1)

    def arguments(t: dict[str, Tensor]) -> tuple[Tensor, list[ops.DualPathWeights], ops.ProjectionWeights]:
        made = [
            ops.DualPathWeights(
                _norm(t, f"{at}.a"),
                t[f"{at}.conv_a"],
                _norm(t, f"{at}.b"),
                t[f"{at}.conv_b"],
                _norm(t, f"{at}.c"),
                t[f"{at}.conv_c"],
            )
            for at in range(blocks)
        ]
        return t["input"], made, ops.ProjectionWeights(_norm(t, "projection"), t["projection.conv"])

    def fast(t: dict[str, Tensor]) -> Tensor:
        x, made, projection = arguments(t)
        return ops.dual_path_stage(
            x, made, residual_channels=residual, projection=projection, stride=stride, memory=memory
        )[0]

    def plain(t: dict[str, Tensor]) -> Tensor:
        x, made, projection = arguments(t)
        return reference.dual_path_stage(x, made, residual_channels=residual, projection=projection, stride=stride)[0]

    return Case(n.made, fast, plain)


def _residual_dense_block() -> Case:
    n = _Numbers(3)
    channels, growth, layers = 16, 8, 3
    n.normal("input", 1, channels, 13, 11)
    for at in range(layers + 1):
        out = growth if at < layers else channels
        n.weight(f"{at}.weight", out, channels + at * growth, 3, 3)
        n.normal(f"{at}.bias", out)

    def convs(t: dict[str, Tensor]) -> list[ops.ConvWeights]:
        return [ops.ConvWeights(t[f"{at}.weight"], t[f"{at}.bias"]) for at in range(layers + 1)]

    return Case(
        n.made,
        lambda t: ops.residual_dense_block(t["input"], convs(t)[:-1], convs(t)[-1], scale=0.2),
        lambda t: reference.residual_dense_block(t["input"], convs(t)[:-1], convs(t)[-1], scale=0.2),
    )


def _norm_relu_max_pool() -> Case:
    n = _Numbers(4)
    n.normal("input", 2, 16, 15, 12)
    n.norm("norm", 16)
    window: tuple[Any, ...] = ((3, 3), (2, 2), (1, 1))
    return Case(
        n.made,
        lambda t: ops.norm_relu_max_pool(t["input"], _norm(t, "norm"), *window)[0],
        lambda t: reference.norm_relu_max_pool(t["input"], _norm(t, "norm"), *window)[0],
    )


def _highway_gate() -> Case:
    n = _Numbers(5)
    n.normal("input", 2, 12, 6, 5)
    n.normal("projection", 2, 24, 6, 5)

    def plain(t: dict[str, Tensor]) -> Tensor:
        h, gate = t["projection"].chunk(2, 1)
        gate = gate.sigmoid()
        return h.relu() * gate + t["input"] * (1 - gate)

    return Case(n.made, lambda t: ops.highway_gate(t["input"], t["projection"], "relu"), plain)


def _mean_join() -> Case:
    n = _Numbers(6)
    names = [n.normal(f"input{at}", 2, 12, 6, 5) for at in range(3)]
    return Case(
        n.made,
        lambda t: ops.mean_join([t[name] for name in names]),
        lambda t: reference.mean_join([t[name] for name in names]),
    )


def _dual_path_merge() -> Case:
    n = _Numbers(7)
    n.normal("input", 2, 24, 6, 5)
    n.normal("features", 2, 24, 6, 5)

    def plain(t: dict[str, Tensor]) -> Tensor:
        x, z = t["input"], t["features"]
        return torch.cat([x[:, :16] + z[:, :16], x[:, 16:], z[:, 16:]], 1)

    return Case(n.made, lambda t: ops.dual_path_merge(t["input"], t["features"], 16), plain)


def _bicubic(scale: float) -> Case:
    n = _Numbers(8)
    n.normal("input", 1, 3, 17, 20)
    antialias = scale < 1

    def plain(t: dict[str, Tensor]) -> Tensor:
        # Computed in float64 wherever torch's own kernel rounds its coefficients to the type of the input.
        return F.interpolate(t["input"], scale_factor=scale, mode="bicubic", antialias=antialias)

    preset: Preset = "torch_antialias" if antialias else "torch"
    return Case(n.made, lambda t: ops.bicubic_resize(t["input"], scale_factor=scale, preset=preset), plain)


OPERATORS: dict[str, Callable[[], Case]] = {
    "dense_block": lambda: _dense_block((9, 7), "balanced"),
    "dense_block, growth rate 32": lambda: _dense_block((16, 17), "balanced", growth=32),  # as in DenseNet-121
    "dense_block, memory=min": lambda: _dense_block((9, 7), "min"),
    "dense_block, 3-D": lambda: _dense_block((5, 4, 6), "balanced"),
    "dense_block, batch norm, SiLU": lambda: _dense_block((9, 7), "balanced", act="silu"),
    "dense_block, group norm, PReLU": lambda: _dense_block((9, 7), "min", groups=4, act="prelu"),
    "dual_path_stage": lambda: _dual_path_stage("balanced"),
    "dual_path_stage, strided": lambda: _dual_path_stage("min", 48, 16, 2),  # groups that chunks of channels cut
    "dual_path_stage, reversible": lambda: _dual_path_stage("reversible"),
    "residual_dense_block": _residual_dense_block,
    "norm_relu_max_pool": _norm_relu_max_pool,
    "highway_gate": _highway_gate,
    "mean_join": _mean_join,
    "dual_path_merge": _dual_path_merge,
    "bicubic_resize, x2": lambda: _bicubic(2.0),
    "bicubic_resize, x0.5": lambda: _bicubic(0.5),
}

# Whose kernels round factors of float32 to TF32. So large that it does not matter which few signs of what a ReLU reads
# rounding changes.
ROUNDED_TO_TF32 = ("dense_block, growth rate 32",)
# What the operator, or plain PyTorch, takes in float64 and float32 only.
WIDE_TYPES_ALONE = ("dense_block, 3-D", "dual_path_stage, reversible")

# One small network of each family that fuses modules, and the size of its input.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "DenseNet": (lambda: models.densenet_cifar(22, 8), (4, 3, 16, 16)),
    "DenseNet, memory=min": (lambda: models.densenet_cifar(22, 8, memory="min"), (4, 3, 16, 16)),
    "FC-DenseNet": (
        lambda: models.FCDenseNet(8, (2, 2), 2, (2, 2), init_features=16, drop_rate=0.0),
        (1, 3, 16, 16),
    ),
    "DPN": (
        lambda: models.DPN(
            stem_channels=8,
            stem_kernel=3,
            width=16,
            groups=4,
            blocks=(1, 2, 1, 1),
            growth_rates=(4, 4, 4, 4),
            residual_channels=16,
            num_classes=10,
        ),
        (2, 3, 32, 32),
    ),
    "RRDBNet": (lambda: models.RRDBNet(4, blocks=1, width=16, growth_rate=8), (1, 3, 12, 12)),
    "RDN": (lambda: models.rdn(2, blocks=2, layers=3, width=16), (1, 3, 12, 12)),
    "SRDenseNet": (models.srdensenet, (1, 1, 8, 8)),
}

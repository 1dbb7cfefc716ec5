# SPDX-License-Identifier: Apache-2.0
"""Reads dense blocks without norms: of this library, and of others by what their convolutions look like and compute."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdense.fusion.checks import NotFusible, check_conv, check_no_global_hooks, check_no_hooks, is_pointwise
from fastdense.fusion.equivalence import (
    NoRandomNumbers,
    Situation,
    Step,
    Trial,
    double_copy,
    isolated,
    plain_forward,
    random_input,
)
from fastdense.fusion.plan.outcome import tried
from fastdense.fusion.plan.state import plain_class
from fastdense.ops import ConvWeights
from fastdense.plain.residual_dense_block import PlainResidualDenseBlock
from fastdense.plain.sr_dense_block import PlainSRDenseBlock

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


# Slopes that the equivalence check compares where no module tells.
_SLOPES = (0.2, 0.0, 0.1, 0.01, 0.05)


class ResidualLayers(NamedTuple):
    """The convolutions of a residual dense block and its factors."""

    layers: list[ConvWeights]
    fusion: ConvWeights
    negative_slope: float
    scale: float


class GrowingLayers(NamedTuple):
    """The convolutions of a block of SRDenseNet: the first reads the input, the others what the block has made."""

    layers: list[ConvWeights]
    in_channels: int
    negative_slope: float

    @property
    def growth_rate(self) -> int:
        return self.layers[0].weight.shape[0]

    @property
    def out_channels(self) -> int:
        return self.in_channels + len(self.layers) * self.growth_rate

    @property
    def first_channels(self) -> list[int]:
        return [0] + [self.in_channels] * (len(self.layers) - 1)


def _convolutions(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, inner) for name, inner in module.named_modules() if isinstance(inner, nn.Conv2d)]


def looks_like_residual_block(module: nn.Module) -> bool:
    """Whether the convolutions are those of a residual dense block and nothing else has parameters or state.

    All but the last read ``C0, C0 + k, C0 + 2 k ...`` channels and make ``k``; the last makes ``C0`` of all.
    """
    convs = _only_convolutions(module)
    if not convs or runs_layers_apart(module):
        return False
    channels, growth = convs[0].in_channels, convs[0].out_channels
    chain = all(
        conv.in_channels == channels + at * growth and conv.out_channels == growth for at, conv in enumerate(convs[:-1])
    )
    fusion = convs[-1]
    ends = fusion.in_channels == channels + (len(convs) - 1) * growth and fusion.out_channels == channels
    return chain and ends


def runs_layers_apart(module: nn.Module) -> bool:
    """Whether a block of this library has norms or activations that no operator runs: its layers are another block."""
    return isinstance(module, PlainResidualDenseBlock) and "dense" in module._modules


def looks_like_growing_block(module: nn.Module) -> bool:
    """Whether the convolutions are those of a block of SRDenseNet and nothing else has parameters or state.

    The first reads ``C0`` channels and makes ``k``; the others read ``k, 2 k ...`` and make ``k``.
    """
    convs = _only_convolutions(module)
    growth = convs[0].out_channels if convs else 0
    return bool(convs) and all(
        conv.in_channels == at * growth and conv.out_channels == growth for at, conv in enumerate(convs[1:], 1)
    )


def _only_convolutions(module: nn.Module) -> list[Any]:
    """The convolutions of a module that are three or more and alone have parameters or state; else none."""
    convs = [] if isinstance(module, _CONTAINERS) else [conv for _, conv in _convolutions(module)]
    own = {id(tensor) for conv in convs for tensor in conv.parameters()}
    alone = all(id(tensor) in own for tensor in [*module.parameters(), *module.buffers()])
    return convs if len(convs) >= 3 and alone else []


def read_residual_block(module: nn.Module) -> ResidualLayers:
    """Reads the layers of a residual dense block.

    A block of another library is checked numerically, on a copy with random weights: which slope and which factor make
    its results. It is checked again when one of its numbers has changed.
    """
    convs = _convolutions(module)
    kernel = 1 if is_pointwise(convs[-1][1]) else 3
    weights = _read_weights(module, [3] * (len(convs) - 1) + [kernel])
    slope, scale = _factors(module)
    return ResidualLayers(weights[:-1], weights[-1], slope, scale)


def read_growing_block(module: nn.Module) -> GrowingLayers:
    """Reads the layers of a block of SRDenseNet; one of another library is checked like a residual dense block."""
    convs = _convolutions(module)
    weights = _read_weights(module, [3] * len(convs))
    if _is_own(module, PlainSRDenseBlock) and len(list(module.modules())) == 2 + 2 * len(convs):
        slope = 0.0
    else:
        slope = tried(module, _try_out_growing)
    return GrowingLayers(weights, convs[0][1].in_channels, slope)


def _read_weights(module: nn.Module, kernels: list[int]) -> list[ConvWeights]:
    check_no_global_hooks()
    for name, inner in module.named_modules():
        if inner is not module:
            check_no_hooks(inner, name)
    convs = _convolutions(module)
    for (name, conv), kernel in zip(convs, kernels, strict=True):
        check_conv(conv, name, kernel, bias=True)
    return [ConvWeights(conv.weight, conv.bias) for _, conv in convs]


def _factors(module: Any) -> tuple[float, float]:
    if _is_own(module, PlainResidualDenseBlock) and len(list(module.modules())) == 1 + len(_convolutions(module)):
        return module.negative_slope, module.scale
    return tried(module, _try_out)


def _is_own(module: nn.Module, plain: type) -> bool:
    """Whether a module is this library's block, which needs no trial, and nothing derived from it that computes."""
    return isinstance(module, plain) and plain_class(type(module)).forward is plain.__dict__["forward"]


def _slope(activation: Any) -> float:
    return float(getattr(activation, "negative_slope", 0.0))


class _Tried(NamedTuple):
    """A copy of a module with random weights, its convolutions, and what it made."""

    trial: Trial
    convs: list[Any]
    made: dict[Situation, Step]
    slopes: Sequence[float]


def _try_module(module: nn.Module) -> _Tried:
    activations = (inner for inner in module.modules() if type(inner) in (nn.ReLU, nn.LeakyReLU))
    slopes = sorted({_slope(activation) for activation in activations}) or _SLOPES
    twin = double_copy(module)
    convs = [conv for _, conv in _convolutions(twin)]
    trial = Trial(twin, random_input(convs[0], convs[0].in_channels), NoRandomNumbers)
    return _Tried(trial, convs, trial.steps(plain_forward(twin)), slopes)


def _try_out(module: nn.Module) -> tuple[float, float]:
    """Slope and factor with which the definition makes the module's results and gradients."""
    with isolated():
        trial, convs, made, slopes = _try_module(module)
        x, found = trial.input, made[Situation(True)].tensors[0]
        for slope in slopes:
            with torch.no_grad():
                scale = _factor(found, _fused(convs, x, slope), x)
            if trial.agrees(lambda x: scale * _fused(convs, x, slope) + x, made):  # noqa: B023
                return slope, scale
    raise NotFusible("its results differ from those of a residual dense block")


def _fused(convs: list[Any], x: Tensor, slope: float) -> Tensor:
    *layers, fusion = convs
    return F.conv2d(_grow(layers, x, slope), fusion.weight, fusion.bias, padding=fusion.weight.shape[2] // 2)


def _try_out_growing(module: nn.Module) -> float:
    """The slope with which the definition makes the module's results and gradients."""
    with isolated():
        trial, convs, made, slopes = _try_module(module)
        channels = trial.input.shape[1]
        for slope in slopes:
            if trial.agrees(lambda x: _grow(convs, x, slope, channels), made):  # noqa: B023
                return slope
    raise NotFusible("its results differ from its input, concatenated with the features of its layers")


def _grow(convs: list[Any], x: Tensor, slope: float, first: int = 0) -> Tensor:
    """The input and what every layer makes; those behind the first layer read from channel ``first`` on."""
    features = x
    for at, conv in enumerate(convs):
        read = features[:, first if at else 0 :]
        new = F.conv2d(read, conv.weight, conv.bias, padding=1)
        new = F.relu(new) if slope == 0 else F.leaky_relu(new, slope)  # which makes NaN of -inf with slope 0
        features = torch.cat([features, new], 1)
    return features


def _factor(found: Tensor | None, fused: Tensor, x: Tensor) -> float:
    """The factor with which ``found`` is ``factor * fused + x``, if there is one."""
    if found is None or found.shape != x.shape:
        raise NotFusible("its output does not have the shape of its input")
    return round(float(((found - x) * fused).sum() / fused.square().sum()), 12)

# SPDX-License-Identifier: Apache-2.0
"""Reads dense blocks without norms: of this library, and of others by what their convolutions look like and compute."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdense.fusion.checks import NotFusible, check_conv, check_no_global_hooks, check_no_hooks
from fastdense.fusion.equivalence import NoRandomNumbers, double_copy, isolated, plain_forward, random_input, tried
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
    kernel = 1 if tuple(convs[-1][1].kernel_size) == (1, 1) else 3
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


class _Equivalence(NamedTuple):
    """What a copy of a module with random weights made of a random input, in training and in eval mode."""

    convs: list[Any]
    input: Tensor
    results: list[Any]
    slopes: Sequence[float]


def _try_module(module: nn.Module) -> _Equivalence:
    activations = (inner for inner in module.modules() if type(inner) in (nn.ReLU, nn.LeakyReLU))
    slopes = sorted({_slope(activation) for activation in activations}) or _SLOPES
    twin = double_copy(module)
    convs = [conv for _, conv in _convolutions(twin)]
    x = random_input(convs[0], convs[0].in_channels)
    forward = plain_forward(twin)
    results = []
    for mode in (True, False):
        twin.train(mode)
        with NoRandomNumbers():
            out, again = forward(x.clone()), forward(x.clone())
        if isinstance(out, Tensor) and not torch.equal(out, again):
            raise NotFusible("its results differ from run to run")
        results.append(out)
    return _Equivalence(convs, x, results, slopes)


def _try_out(module: nn.Module) -> tuple[float, float]:
    """Slope and factor with which the definition makes the module's results."""
    with isolated(), torch.no_grad():
        check = _try_module(module)
        *layers, fusion = check.convs
        for slope in check.slopes:
            features = _grow(layers, check.input, slope)
            fused = F.conv2d(features, fusion.weight, fusion.bias, padding=fusion.kernel_size[0] // 2)
            scale = _factor(check.results, fused, check.input)
            if scale is not None:
                return slope, scale
    raise NotFusible("its results differ from those of a residual dense block")


def _try_out_growing(module: nn.Module) -> float:
    """The slope with which the definition makes the module's results."""
    with isolated(), torch.no_grad():
        check = _try_module(module)
        channels = check.input.shape[1]
        for slope in check.slopes:
            expected = _grow(check.convs, check.input, slope, channels)
            if all(
                isinstance(out, Tensor) and out.shape == expected.shape and torch.allclose(out, expected, 1e-8, 1e-8)
                for out in check.results
            ):
                return slope
    raise NotFusible("its results differ from its input, concatenated with the features of its layers")


def _grow(convs: list[Any], x: Tensor, slope: float, first: int = 0) -> Tensor:
    """The input and what every layer makes; those behind the first layer read from channel ``first`` on."""
    features = x
    for at, conv in enumerate(convs):
        read = features[:, first if at else 0 :]
        new = F.leaky_relu(F.conv2d(read, conv.weight, conv.bias, padding=1), slope)
        features = torch.cat([features, new], 1)
    return features


def _factor(found: list[Any], fused: Tensor, x: Tensor) -> float | None:
    """The one factor with which every result is ``factor * fused + x``, to nine digits, or None."""
    first = found[0]
    if not isinstance(first, Tensor) or first.shape != x.shape:
        return None
    factor = round(float(((first - x) * fused).sum() / fused.square().sum()), 9)
    same = all(torch.allclose(out, factor * fused + x, rtol=1e-8, atol=1e-8) for out in found)
    return factor if same else None

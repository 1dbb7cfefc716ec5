# SPDX-License-Identifier: Apache-2.0
"""Reads residual dense blocks: of this library, and of others by what their convolutions look like and compute."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdense.nn.structure import NotFusible, check_conv, check_no_global_hooks, check_quiet
from fastdense.nn.trial import double_copy, isolated, plain_forward, random_input, tried
from fastdense.ops import ConvWeights

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Slopes that are tried where no module tells.
_SLOPES = (0.2, 0.0, 0.1, 0.01, 0.05)


class ResidualLayers(NamedTuple):
    """The convolutions of a residual dense block and its factors."""

    layers: list[ConvWeights]
    fusion: ConvWeights
    negative_slope: float
    scale: float


def _convolutions(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, inner) for name, inner in module.named_modules() if isinstance(inner, nn.Conv2d)]


def looks_like_residual_block(module: nn.Module) -> bool:
    """Whether the convolutions are those of a residual dense block and nothing else has parameters or state.

    All but the last read ``C0, C0 + k, C0 + 2 k ...`` channels and make ``k``; the last makes ``C0`` of all.
    """
    if isinstance(module, _CONTAINERS):
        return False
    convs = [conv for _, conv in _convolutions(module)]
    if len(convs) < 3:
        return False
    channels, growth = convs[0].in_channels, convs[0].out_channels
    chain = all(
        conv.in_channels == channels + at * growth and conv.out_channels == growth for at, conv in enumerate(convs[:-1])
    )
    fusion = convs[-1]
    ends = fusion.in_channels == channels + (len(convs) - 1) * growth and fusion.out_channels == channels
    own = {id(tensor) for conv in convs for tensor in conv.parameters()}
    return chain and ends and all(id(tensor) in own for tensor in [*module.parameters(), *module.buffers()])


def read_residual_block(module: nn.Module) -> ResidualLayers:
    """Reads the layers of a residual dense block.

    A block of another library is tried on random numbers, with random weights, in a copy: which slope and which factor
    make its results. It is tried again when one of its numbers has changed.
    """
    check_no_global_hooks()
    convs = _convolutions(module)
    for name, inner in module.named_modules():
        if inner is not module:
            check_quiet(inner, name)
    for at, (name, conv) in enumerate(convs):
        last = at == len(convs) - 1
        check_conv(conv, name, 1 if last and tuple(conv.kernel_size) == (1, 1) else 3, bias=True)
    weights = [ConvWeights(conv.weight, conv.bias) for _, conv in convs]
    slope, scale = _factors(module)
    return ResidualLayers(weights[:-1], weights[-1], slope, scale)


def _factors(module: Any) -> tuple[float, float]:
    from fastdense.nn.residual_dense_block import PlainResidualDenseBlock

    if isinstance(module, PlainResidualDenseBlock):
        return module.negative_slope, module.scale
    return tried(module, _try_out)


def _slope(activation: Any) -> float:
    return float(getattr(activation, "negative_slope", 0.0))


def _try_out(module: nn.Module) -> tuple[float, float]:
    """Slope and factor with which the definition makes the module's results."""
    activations = (inner for inner in module.modules() if type(inner) in (nn.ReLU, nn.LeakyReLU))
    slopes = sorted({_slope(activation) for activation in activations}) or _SLOPES
    with isolated(), torch.no_grad():
        twin = double_copy(module)
        convs = [conv for _, conv in _convolutions(twin)]
        x = random_input(convs[0], convs[0].in_channels)
        forward = plain_forward(twin)
        found = []
        for mode in (True, False):
            twin.train(mode)
            found.append(forward(x.clone()))
        for slope in slopes:
            scale = _factor(found, _fuse(convs, x, slope), x)
            if scale is not None:
                return slope, scale
    raise NotFusible("its results are not those of a residual dense block")


def _fuse(convs: list[Any], x: Tensor, slope: float) -> Tensor:
    features = [x]
    for conv in convs[:-1]:
        features.append(F.leaky_relu(F.conv2d(torch.cat(features, 1), conv.weight, conv.bias, padding=1), slope))
    fusion = convs[-1]
    return F.conv2d(torch.cat(features, 1), fusion.weight, fusion.bias, padding=fusion.kernel_size[0] // 2)


def _factor(found: list[Any], fused: Tensor, x: Tensor) -> float | None:
    """The one factor with which every result is ``factor * fused + x``, to nine digits, or None."""
    first = found[0]
    if not isinstance(first, Tensor) or first.shape != x.shape:
        return None
    factor = round(float(((first - x) * fused).sum() / fused.square().sum()), 9)
    same = all(torch.allclose(out, factor * fused + x, rtol=1e-8, atol=1e-8) for out in found)
    return factor if same else None

# SPDX-License-Identifier: Apache-2.0
"""Reads residual dense blocks: of this library, and of others by what their convolutions look like and compute."""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdense.nn.structure import NotFusible, check_conv, check_no_global_hooks, check_quiet
from fastdense.ops import ConvWeights

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Slopes that are tried where no module tells.
_SLOPES = (0.2, 0.0, 0.1, 0.01, 0.05)
# Where a module keeps what trying it has told.
_FACTORS = "_residual_factors"


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
    numbers = _numbers(module)
    known = module.__dict__.get(_FACTORS)
    if known is None or known[0] != numbers:
        slopes = sorted({_slope(inner) for inner in module.modules() if type(inner) in (nn.ReLU, nn.LeakyReLU)})
        known = module.__dict__[_FACTORS] = (numbers, _try_out(module, tuple(slopes) or _SLOPES))
    return known[1]


def _numbers(module: nn.Module) -> list[tuple[str, Any]]:
    """The attributes that may be factors: numbers, and tensors that are neither parameter nor buffer."""
    found: list[tuple[str, Any]] = []
    for inner in module.modules():
        if isinstance(inner, nn.Conv2d):
            continue
        for name, value in inner.__dict__.items():
            if isinstance(value, int | float) and name != "training":
                found.append((name, value))
            elif isinstance(value, Tensor):
                found.append((name, (id(value), value._version)))
    return found


def _slope(activation: Any) -> float:
    return float(getattr(activation, "negative_slope", 0.0))


def _try_out(module: nn.Module, slopes: tuple[float, ...]) -> tuple[float, float]:
    """Slope and factor with which the definition makes the module's results."""
    if any(p.is_meta for p in module.parameters()):
        raise NotFusible("its weights have no values to try it with")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        clone = copy.deepcopy(module).to("cpu", torch.float64)
        convs = [conv for _, conv in _convolutions(clone)]
        for conv in convs:
            for parameter in conv.parameters():
                parameter.copy_(torch.randn_like(parameter) / (9 * conv.in_channels) ** 0.5)
        forward = getattr(type(clone), "plain_forward", type(clone).__call__)
        x = torch.randn(2, convs[0].in_channels, 5, 6, dtype=torch.float64)
        try:
            found = [forward(clone.train(mode), x.clone()) for mode in (True, False)]
        except Exception as error:  # whatever a foreign forward raises, it is no such block
            raise NotFusible(f"it cannot be tried on one tensor: {error}") from error
        for slope in slopes:
            fused = _fuse(convs, x, slope)
            scale = _factor(found, fused, x)
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

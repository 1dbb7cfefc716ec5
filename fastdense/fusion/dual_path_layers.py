# SPDX-License-Identifier: Apache-2.0
"""Reads plain dual path blocks, as :mod:`fastdense.fusion.dense_layers` reads dense ones."""

import sys
from typing import Any, NamedTuple

import torch
from torch import nn

from fastdense.fusion.checks import (
    NotFusible,
    check_conv,
    check_fits,
    check_no_global_hooks,
    check_no_hooks,
    check_norm_relu,
    child,
    is_known_class,
)
from fastdense.fusion.dense_layers import norm_weights, read_stochastic_depth, scaled
from fastdense.ops import DualPathWeights, ProjectionWeights
from fastdense.plain.stochastic_depth import StochasticDepth

# Classes that are known to add and to concatenate, and those of their children; by name, as no library need be loaded.
_LIBRARIES = ("timm.models.dpn", "segmentation_models_pytorch.encoders._dpn", "pretrainedmodels.models.dpn")


DUAL_PATH_BLOCKS = (
    *((library, "DualPathBlock") for library in _LIBRARIES),
    ("fastdense.plain.dual_path", "PlainDualPathBlock"),
)


_CONVOLUTIONS = (*((library, "BnActConv2d") for library in _LIBRARIES), ("fastdense.plain.dual_path", "NormReluConv"))


# What joins both paths in front of a norm where blocks hand them on as a pair: in all but timm's later versions.
_JOIN = "CatBnAct"


_NORMS = (
    *((library, _JOIN) for library in _LIBRARIES),
    ("timm.models.dpn", "BnAct"),
    ("fastdense.plain.dual_path", "NormRelu"),
)


class NormConv(NamedTuple):
    """Norm, ReLU, convolution; two convolutions side by side in the last of a "b" variant's block."""

    norm: nn.BatchNorm2d
    convs: tuple[nn.Conv2d, ...]

    @property
    def weight(self) -> torch.Tensor:
        weights = [conv.weight for conv in self.convs]
        return weights[0] if len(weights) == 1 else torch.cat(weights)


class DualPath(NamedTuple):
    """The modules of a block; ``projection`` at the head of a stage, ``stride`` its and conv_b's."""

    projection: NormConv | None
    a: NormConv
    b: NormConv
    c: NormConv
    residual_channels: int
    stride: int
    depth: StochasticDepth | None = None

    @property
    def growth(self) -> int:
        return sum(conv.out_channels for conv in self.c.convs) - self.residual_channels


def read_dual_path_block(module: Any) -> DualPath:
    """Reads c1x1_w_s1 or c1x1_w_s2 (at the head of a stage), c1x1_a, c3x3_b, c1x1_c or c1x1_c, c1x1_c1, c1x1_c2."""
    check_no_global_hooks()
    children = {name for name, inner in module.__dict__["_modules"].items() if inner is not None}
    depth = read_stochastic_depth(module, "")
    if depth is not None:
        children.remove("stochastic_depth")
    stride = 1
    projection = None
    for name, wanted in (("c1x1_w_s1", 1), ("c1x1_w_s2", 2)):
        if name in children:
            stride = wanted
            projection = _read_norm_conv(module, name, 1, stride=stride)
            children.remove(name)
    a = _read_norm_conv(module, "c1x1_a", 1)
    b = _read_norm_conv(module, "c3x3_b", None, stride=stride, grouped=True)
    if children == {"c1x1_a", "c3x3_b", "c1x1_c"}:
        c = _read_norm_conv(module, "c1x1_c", 1)
    elif children == {"c1x1_a", "c3x3_b", "c1x1_c", "c1x1_c1", "c1x1_c2"}:
        halves = [check_conv(child(module, name), name, 1) for name in ("c1x1_c1", "c1x1_c2")]
        if halves[0].out_channels != module.num_1x1_c:
            raise NotFusible(f"c1x1_c1 has {halves[0].out_channels} output channels, not {module.num_1x1_c}")
        c = NormConv(_read_norm(module, "c1x1_c", _NORMS, {"bn"}), tuple(halves))
    else:
        raise NotFusible(f"its sub-modules are {', '.join(sorted(children))}")
    return DualPath(projection, a, b, c, int(module.num_1x1_c), stride, depth)


def hands_on_pairs(module: nn.Module) -> bool:
    """Whether the plain block returns its residual and its dense path as a tuple, not as one tensor."""
    for base in type(module).__mro__:
        if (base.__module__, base.__qualname__) in DUAL_PATH_BLOCKS:
            return hasattr(sys.modules.get(base.__module__), _JOIN)
    return False


def split_of(module: Any) -> int | None:
    """Where both paths are parted if the plain block hands them on as a pair."""
    return int(module.num_1x1_c) if hands_on_pairs(module) else None


def _read_norm(module: Any, name: str, classes: tuple[tuple[str, str], ...], children: set[str]) -> Any:
    inner: Any = child(module, name)
    found = set(inner.__dict__["_modules"]) if inner is not None else set()
    relu = "act" if "act" in found else "relu"
    if inner is None or not is_known_class(inner, classes) or found - {relu} != children:
        raise NotFusible(f"{name} is a {type(inner).__name__}, expected a norm and ReLU before a convolution")
    check_no_hooks(inner, name)
    return check_norm_relu(inner, "bn", relu, f"{name}.")


def _read_norm_conv(module: Any, name: str, kernel: int | None, *, stride: int = 1, grouped: bool = False) -> NormConv:
    norm = _read_norm(module, name, _CONVOLUTIONS, {"bn", "conv"})
    inner: Any = child(module, name)
    conv = check_conv(child(inner, "conv"), f"{name}.conv", kernel, stride=stride, grouped=grouped)
    check_fits(norm, f"{name}.bn", norm.num_features, conv.weight.dim() - 2)
    return NormConv(norm, (conv,))


def block_weights(block: DualPath, factor: float | torch.Tensor = 1.0) -> DualPathWeights:
    return DualPathWeights(
        norm_weights(block.a.norm),
        block.a.weight,
        norm_weights(block.b.norm),
        block.b.weight,
        norm_weights(block.c.norm),
        scaled(block.c.weight, factor),
    )


def projection_weights(projection: NormConv) -> ProjectionWeights:
    return ProjectionWeights(norm_weights(projection.norm), projection.weight)


def fit_together(blocks: list[DualPath], block: DualPath) -> bool:
    """Whether ``block`` may stand behind ``blocks`` in one stage."""

    def common(of: DualPath) -> tuple[Any, ...]:
        shape = of.b.weight.shape
        return (of.residual_channels, of.growth, of.a.weight.shape[0], *shape, of.b.convs[0].groups)

    return block.projection is None and common(block) == common(blocks[0])

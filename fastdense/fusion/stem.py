# SPDX-License-Identifier: Apache-2.0
"""Reads and runs the norm, ReLU and max pool of a stem as one operator."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdense.fusion.base import check_no_transforms, check_runs_here
from fastdense.fusion.batch_statistics import group_name, process_group_of, read_update, update_norms
from fastdense.fusion.checks import (
    CONVS,
    SAMPLE_NORMS,
    NotFusible,
    check_fits,
    check_no_hooks,
    check_norm,
    has_fused_relu,
    is_known_class,
    per_axis,
)
from fastdense.fusion.dense_layers import is_activation, norm_weights
from fastdense.fusion.max_pool_transition import POOLS, check_unobserved, is_recomputable, run_recomputed
from fastdense.ops import norm_relu_max_pool
from fastdense.ops.arguments import count_pixels
from fastdense.ops.conv_norm_relu_max_pool import Convolution, conv_norm_relu_max_pool
from fastdense.ops.norm_relu_max_pool import MAX_WINDOW


class PoolSizes(NamedTuple):
    """A max pool as :func:`fastdense.ops.norm_relu_max_pool` takes it: one number an axis."""

    kernel_size: list[int]
    stride: list[int]
    padding: list[int]


class Stem(NamedTuple):
    """A norm, its activation unless that is inside, and a max pool; its sizes where the operator can run all three.

    ``conv`` is the convolution in front where it runs with them, and again in backward; ``front`` the one of a module
    that holds it, the norm and perhaps the activation, and runs by itself.
    """

    modules: list[Any]
    pool: PoolSizes | None
    conv: Any = None
    front: Any = None

    @property
    def norm(self) -> Any:
        return self.modules[0]

    @property
    def length(self) -> int:
        """How many modules of a row it takes."""
        return 2 if self.front is not None else len(self.modules) + (self.conv is not None)

    def takes(self, input: Tensor) -> bool:
        """Whether the operator runs in place of the modules: the pool, and dimensions and types as torch has them."""
        norm = self.norm
        tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        types = {t.dtype for t in tensors if t is not None}
        mixed = input.dtype.itemsize == 2 and types == {torch.float32}
        has_axes = self.pool is not None and input.dim() == 2 + len(self.pool.kernel_size)
        return has_axes and (mixed or types <= {input.dtype})


_CONV_NORM_ACTS = (("timm.layers.conv_bn_act", "ConvNormAct"), ("fastdense.models.dpn", "ConvNormAct"))


def is_conv_norm_act(module: nn.Module) -> bool:
    """Whether a module is a convolution, its norm and an activation."""
    return is_known_class(module, _CONV_NORM_ACTS)


def _read_conv_norm_act(module: nn.Module, pool: Sequence[nn.Module]) -> Stem:
    inner = {name: child for name, child in module.__dict__["_modules"].items() if child is not None}
    if list(inner) not in (["conv", "bn"], ["conv", "bn", "act"]):
        raise NotFusible(f"its sub-modules are {', '.join(inner)}")
    check_no_hooks(module, "it")
    front, *behind = inner.values()
    return read_stem([*behind, *pool])._replace(front=front)


def read_stem(modules: Sequence[nn.Module]) -> Stem:
    """The stem that ``modules`` begin with: the norm, a convolution in front of it, or what holds both."""
    conv: Any = modules[0]
    if is_conv_norm_act(conv):
        return _read_conv_norm_act(conv, modules[1:2])
    if type(conv) in CONVS:
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise NotFusible("its convolution has padding that depends on the input")
        check_no_hooks(conv, "conv")
        return read_stem(modules[1:])._replace(conv=conv)
    found: list[Any] = []
    if has_fused_relu(modules[0]):
        found = list(modules[:2])
    elif len(modules) > 1 and is_activation(modules[1]):
        found = list(modules[:3])
    if not found or type(found[-1]) not in POOLS:
        raise NotFusible("it is not followed by an activation and a max pool")
    check_unobserved(found)
    if type(found[0]) in SAMPLE_NORMS:
        if not is_recomputable(found[0]):
            raise NotFusible("its norm moves running statistics of samples")
        return Stem(found, None)
    check_norm(found[0], "norm")
    check_fits(found[0], "norm", found[0].num_features, POOLS.index(type(found[-1])) + 1)
    has_relu = len(found) == 2 or type(found[1]) is nn.ReLU
    return Stem(found, _pool_sizes(found[-1]) if has_relu else None)


def run_stem(stem: Stem, contiguous: bool, input: Tensor) -> Tensor:
    """One operator call for a norm, ReLU and max pool, where it knows the pool; else they are run again in backward."""
    check_no_transforms()
    if stem.front is not None:
        input = stem.front(input)
    conv = stem.conv
    if conv is not None and (torch.compiler.is_compiling() or not torch.is_grad_enabled()):
        input = conv(input)
        conv = None
    try:
        check_runs_here("norm_relu_max_pool", input)
        group = None if stem.pool is None else process_group_of([stem.norm])
        # The norm reads what has the dimensions and, by the convolution and autocast, the type of what follows it.
        if stem.pool is None or not stem.takes(input if conv is None else _in_type_of(conv, input)):
            raise NotFusible("the fused operator does not support this pool or mix of dtypes")
        if input.numel() == 0 and group is None:
            raise NotFusible("empty batch: no batch statistics")
    except NotFusible:
        return run_recomputed(stem.modules, input if conv is None else conv(input))
    weights = norm_weights(stem.norm)
    if torch.is_grad_enabled() and weights.running_mean is not None and weights.running_var is not None:
        # A training step in between may move what is saved for backward.
        weights = weights._replace(running_mean=weights.running_mean.clone(), running_var=weights.running_var.clone())
    if conv is None:
        out, statistics = norm_relu_max_pool(input, weights, *stem.pool, process_group=group_name(group))
        count = count_pixels(input)
    else:
        dims = conv.weight.dim() - 2
        stride, padding, dilation = (per_axis(size, dims) for size in (conv.stride, conv.padding, conv.dilation))
        convolution = Convolution(conv.weight, conv.bias, stride, padding, dilation, conv.groups)
        out, statistics, count = conv_norm_relu_max_pool(
            input, convolution, weights, *stem.pool, process_group=group_name(group)
        )
    out = out.contiguous() if contiguous else out
    update_norms(read_update([(stem.norm, 0)]), statistics, count, group)
    return out


def _in_type_of(conv: Any, input: Tensor) -> Tensor:
    """The input in the type of what a convolution makes of it."""
    if not input.is_meta and torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
        return input.to(torch.get_autocast_dtype(input.device.type))
    if input.dtype != conv.weight.dtype or input.dim() != conv.weight.dim():
        raise NotFusible("the convolution refuses its input")
    return input


def _pool_sizes(pool: Any) -> PoolSizes | None:
    dims = POOLS.index(type(pool)) + 1
    if pool.ceil_mode or pool.return_indices:
        return None
    kernel_size, stride, padding, dilation = (
        per_axis(size, dims) for size in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    )
    if set(dilation) != {1} or math.prod(kernel_size) > MAX_WINDOW:
        return None
    if any(2 * p > k for p, k in zip(padding, kernel_size, strict=True)):  # for torch to refuse
        return None
    return PoolSizes(kernel_size, stride, padding)

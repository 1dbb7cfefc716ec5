# SPDX-License-Identifier: Apache-2.0
"""Floating point operations of the native operators, for ``torch.utils.flop_counter.FlopCounterMode``.

An operator counts as the plain modules that it stands in for: their convolutions, once each in either pass. What it
computes again in the backward pass, or leaves out since it pools before a 1x1 convolution, makes no difference.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


class Conv(NamedTuple):
    """A convolution: shapes, the position of its weight, and that of the first weight which its input depends on."""

    input: Shape
    weight: Shape
    output: Shape
    at: int
    first: int = 0

    @classmethod
    def of(cls, input: Shape, channels: int, weight: Shape, at: int, first: int = 0, stride: int = 1) -> "Conv":
        """One with `same` padding on ``channels`` channels of a tensor of the input's batch and spatial sizes."""
        batch, _, *spatial = input
        behind = [(size - 1) // stride + 1 for size in spatial]
        return cls([batch, channels, *spatial], weight, [batch, weight[0], *behind], at, first)


def dense_block_convs(
    input: Shape, weights: Sequence[Shape], eps: Any, num_layers: int, bottleneck: bool, tail: str
) -> Iterator[Conv]:
    """The convolutions of a dense block and its transition, by the shapes of the operator's arguments."""
    channels, at = input[1], 4  # behind the four tensors of a norm
    for _ in range(num_layers):
        width = channels
        if bottleneck:
            yield Conv.of(input, channels, weights[at], at)
            width, at = weights[at][0], at + 5
        yield Conv.of(input, width, weights[at], at)
        channels, at = channels + weights[at][0], at + 5
    if tail == "transition":
        yield Conv.of(input, channels, weights[at], at)


def dual_path_stage_convs(
    input: Shape,
    weights: Sequence[Shape],
    eps: Any,
    num_blocks: int,
    projection: bool,
    residual_channels: int,
    stride: int,
) -> Iterator[Conv]:
    """The convolutions of a dual path stage: the projection, then three for each block."""
    first = 0
    if projection:
        yield Conv.of(input, input[1], weights[4], 4, stride=stride)
        first = 5
    for index in range(num_blocks):
        at_a, at_b, at_c = (first + 15 * index + at for at in (4, 9, 14))
        # The first block reads the input beside the projection, the others what all before them made.
        depends = first if index == 0 else 0
        yield Conv.of(input, weights[at_a][1], weights[at_a], at_a, depends)
        conv_b = Conv.of(input, weights[at_a][0], weights[at_b], at_b, depends, stride if index == 0 else 1)
        yield conv_b
        input = conv_b.output
        yield Conv.of(input, weights[at_b][0], weights[at_c], at_c, depends)


def _residual_dense_block(input: Shape, weights: Sequence[Shape]) -> Iterator[Conv]:
    for at in range(0, len(weights), 2):
        yield Conv.of(input, weights[at][1], weights[at], at)


def _register(counter: ModuleType) -> None:
    """Adds the formulas to those of ``counter``, the module ``torch.utils.flop_counter``."""
    count: Callable[..., int] = counter.conv_flop_count

    def transposed(shape: Shape) -> Shape:
        return [shape[1], shape[0], *shape[2:]]

    def forward(convs: Iterator[Conv]) -> int:
        return sum(count(conv.input, conv.weight, conv.output) for conv in convs)

    def backward(convs: Iterator[Conv], needs: Sequence[bool]) -> int:
        total = 0
        for conv in convs:
            if needs[0] or any(needs[1 + conv.first : 1 + conv.at]):  # what the convolution reads has a gradient
                total += count(conv.output, conv.weight, conv.input, True)
            if needs[1 + conv.at]:
                total += count(transposed(conv.input), transposed(conv.output), transposed(conv.weight))
        return total

    def dense_block(*arguments: Any, **_: Any) -> int:
        return forward(dense_block_convs(*arguments[:6]))

    def dense_block_backward(_grad: Any, buffer: Shape, *arguments: Any, **_: Any) -> int:
        _mean, _var, _z, weights, eps, num_layers, bottleneck, tail, _rate, _seed, in_channels, needs, *_rest = (
            arguments
        )
        input = [buffer[0], in_channels, *buffer[2:]]
        return backward(dense_block_convs(input, weights, eps, num_layers, bottleneck, tail), needs)

    def dual_path_stage(*arguments: Any, **_: Any) -> int:
        return forward(dual_path_stage_convs(*arguments[:7]))

    def dual_path_stage_backward(_grad: Any, input: Shape, *arguments: Any, **_: Any) -> int:
        *_saved, weights, eps, num_blocks, projection, residual_channels, stride, needs, _group = arguments
        return backward(
            dual_path_stage_convs(input, weights, eps, num_blocks, projection, residual_channels, stride), needs
        )

    def residual_dense_block(input: Shape, weights: Sequence[Shape], *_arguments: Any, **_: Any) -> int:
        return forward(_residual_dense_block(input, weights))

    def residual_dense_block_backward(_grad: Any, buffer: Shape, weights: Any, *arguments: Any, **_: Any) -> int:
        *_options, in_channels, needs = arguments
        return backward(_residual_dense_block([buffer[0], in_channels, *buffer[2:]], weights), needs)

    formulas = {
        "dense_block": dense_block,
        "_dense_block_backward": dense_block_backward,
        "dense_block_inference": dense_block,
        "dual_path_stage": dual_path_stage,
        "_dual_path_stage_backward": dual_path_stage_backward,
        "dual_path_stage_inference": dual_path_stage,
        "residual_dense_block": residual_dense_block,
        "_residual_dense_block_backward": residual_dense_block_backward,
    }
    for name in _WITHOUT_PRODUCTS:
        formulas[name] = lambda *_arguments, **_: 0
    for name, formula in formulas.items():
        counter.register_flop_formula(getattr(torch.ops.fastdense, name))(formula)


# Counted as 0, as torch counts pools, interpolation and elementwise operators.
_WITHOUT_PRODUCTS = (
    "_bicubic_backward",
    "_highway_gate_backward",
    "_norm_relu_max_pool_backward",
    "bicubic",
    "bicubic_uint8",
    "dropout_mask",
    "dual_path_merge",
    "dual_path_split",
    "highway_gate",
    "mean_join",
    "norm_relu_max_pool",
    "pack_dense_block",
    "pack_dual_path_stage",
    "update_running_stats_",
)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds the counter's module as the others do, and registers the formulas once it has run."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != _COUNTER:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = self._running(spec.loader.exec_module)  # type: ignore[assignment,method-assign]
        return spec

    def _running(self, run: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module)

        return run_and_register


def register_flops() -> None:
    """Registers the formulas as soon as somebody imports the counter, which loads triton: too slow to do it here."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Leaves out of the counts what is computed a second time."""
    modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else []
    counters = [cast(Any, mode).counter for mode in modes if type(mode).__module__ == _COUNTER]
    before = [{name: dict(counts) for name, counts in counter.flop_counts.items()} for counter in counters]
    try:
        yield
    finally:
        for counter, counts in zip(counters, before, strict=True):
            counter.flop_counts.clear()
            for name, of_operators in counts.items():
                counter.flop_counts[name].update(of_operators)

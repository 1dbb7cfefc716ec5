# SPDX-License-Identifier: Apache-2.0
"""Counts the floating point operations of a training step, for plans that do not depend on a clock."""

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastdense.ops.flops import Conv, dense_block_convs, dual_path_stage_convs

# Operations a second that counted times stand for. Ratios of such times mean something, the times themselves do not.
NOMINAL_RATE = 1e11


def count_operations(func: Any, arguments: tuple[Any, ...], named: dict[str, Any], result: Any) -> int:
    """Of one call of an operator: those of its products, with what a backward operator computes again."""
    from torch.utils.flop_counter import flop_registry  # which loads triton

    formula = flop_registry.get(func._overloadpacket)
    counted = 0 if formula is None else int(formula(*arguments, **named, out_val=result))
    return counted + sum(_products(conv) for conv in _computed_again(func._schema.name, arguments))


def _products(conv: Conv) -> int:
    return 2 * math.prod(conv.output) * math.prod(conv.weight[1:])


def _computed_again(name: str, arguments: tuple[Any, ...]) -> Iterator[Conv]:
    """The convolutions whose outputs a backward operator was not given."""
    if name == "fastdense::_dense_block_backward":
        _, buffer, _, _, z, weights, eps, num_layers, bottleneck, tail, _, _, in_channels, *_ = arguments
        if bottleneck and len(z) == 0:
            input = [buffer.shape[0], in_channels, *buffer.shape[2:]]
            convs = list(dense_block_convs(input, _shapes(weights), eps, num_layers, bottleneck, tail))
            yield from convs[: 2 * num_layers : 2]
    elif name == "fastdense::_dual_path_stage_backward":
        _, input, _, _, a, _, _, _, weights, eps, num_blocks, projection, residual_channels, stride, *_ = arguments
        if len(a) == 0:
            convs = list(
                dual_path_stage_convs(
                    input.shape, _shapes(weights), eps, num_blocks, projection, residual_channels, stride
                )
            )
            for first in range(int(projection), len(convs), 3):
                yield from convs[first : first + 2]


def _shapes(weights: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(weight.shape) for weight in weights]

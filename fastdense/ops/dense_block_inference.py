# SPDX-License-Identifier: Apache-2.0
"""Dense blocks in inference: frozen norms, nothing kept for backward, weights that may be packed once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdense.ops.arguments import (
    PackedWeights,
    cast_input,
    check_input,
    count_pixels,
    empty_channels_last,
    fill_absent,
)
from fastdense.ops.dense_block import FlatBlock, out_sizes
from fastdense.ops.fakes import register_fake

# Below so many pixels, packing the weights for one call takes longer than it saves.
WORTH_PACKING = 768


def pack_block(flat: FlatBlock, in_channels: int) -> PackedWeights:
    """The weights of a block as :func:`run_inference` reads them.

    norm2 is folded into conv1, 3x3 convolutions are kept as they are for small images, and transformed for Winograd's
    F(4x4, 3x3).
    """
    weights = fill_absent(flat.weights, torch.empty(0))
    tensors = torch.ops.fastdense.pack_dense_block(
        weights, flat.eps, in_channels, flat.num_layers, flat.bottleneck, flat.tail
    )
    return PackedWeights(weights, tensors)


def run_inference(
    input: Tensor, flat: FlatBlock, packed: PackedWeights | None = None, *, contiguous: bool = False
) -> Tensor:
    """The output of :func:`fastdense.ops.dense_block` where all norms have running statistics.

    The same to rounding: norm2 is folded into conv1 and 3x3 convolutions of all but small images go by
    Winograd's F(4x4, 3x3).

    Args:
        input: ``[N, C0, spatial]`` on the CPU.
        flat: the block, of ReLU and batch norms, without dropout.
        packed: what :func:`pack_block` made of these weights; None to pack them for this call.
        contiguous: whether the result is.

    Reference:
        A. Lavin, S. Gray. Fast Algorithms for Convolutional Neural Networks. CVPR 2016, arXiv:1509.09308, section 4.2.
    """
    check_input("dense_block_inference", input)
    if packed is None:
        packed = PackedWeights(fill_absent(flat.weights, input), [])
    input = cast_input("dense_block_inference", input, flat.devices, flat.conv_dtypes)
    return torch.ops.fastdense.dense_block_inference(
        input, packed.weights, flat.eps, flat.num_layers, flat.bottleneck, flat.tail, packed.tensors, contiguous
    )


@register_fake("dense_block_inference")
def _(
    input: Tensor,
    weights: Sequence[Tensor],
    eps: Sequence[float],
    num_layers: int,
    bottleneck: bool,
    tail: str,
    packed: Sequence[Tensor],
    contiguous: bool = False,
) -> Tensor:
    out = empty_channels_last(input, out_sizes(input, weights, num_layers, bottleneck, tail))
    return out.contiguous() if contiguous else out


@register_fake("pack_dense_block")
def _(weights: Sequence[Tensor], *how: Any) -> list[Tensor]:
    known = [weight.new_empty([int(size) for size in weight.shape]) for weight in weights]  # panels of known sizes
    return torch.ops.fastdense.pack_dense_block(known, *how)


def is_worth_packing(input: Tensor) -> bool:
    """Whether a call with weights that are not packed yet is faster this way than as in training."""
    return count_pixels(input) >= WORTH_PACKING

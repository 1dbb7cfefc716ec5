# SPDX-License-Identifier: Apache-2.0
"""A dense block of any layers that saves its output alone for the backward pass."""

from fastdense.fusion.shared_buffer.block import SharedBufferLayers
from fastdense.plain.shared_buffer_block import PlainSharedBufferBlock


class SharedBufferBlock(SharedBufferLayers, PlainSharedBufferBlock):
    """A dense block whose layers may be any modules; linear memory in their number.

    Layer ``l`` maps ``cat([x_0, ..., x_l], 1)`` to new channels ``x_{l+1}``; the output holds all of them. It is all
    that is saved for the backward pass, in which each layer runs once more: about a third more time than plain modules.

    Args:
        layers: modules that map ``[N, c, *]`` to ``[N, k, *]``. The first reads the input, each of the others as many
            channels as all before it have made; growth rates may differ.

    Shape:
        ``[N, C0, *]`` to ``[N, C0 + k_1 + ... + k_L, *]``.

    Raises:
        ValueError: if there are no layers.

    Note:
        Outputs, gradients, running statistics and random numbers are those of plain modules. Layers with hooks,
        parametrizations or fused blocks in them, and code under ``torch.compile``, run as plain modules. Between
        forward and backward pass, neither modules nor parameters may change; the backward pass raises
        ``RuntimeError`` if they do. Double backward is not supported.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = lambda c: nn.Sequential(nn.GroupNorm(1, c), nn.Conv2d(c, 4, 3, padding=1), nn.GELU())
        >>> block = SharedBufferBlock(layer(8 + 4 * l) for l in range(3))
        >>> block(torch.zeros(2, 8, 6, 6)).shape
        torch.Size([2, 20, 6, 6])
    """

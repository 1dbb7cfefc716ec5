# SPDX-License-Identifier: Apache-2.0
"""Fully convolutional DenseNets for segmentation, on shared buffers.

Reference:
    S. Jegou, M. Drozdzal, D. Vazquez, A. Romero, Y. Bengio. The One Hundred Layers Tiramisu: Fully Convolutional
    DenseNets for Semantic Segmentation. CVPR Workshops 2017, arXiv:1611.09326, tables 1 and 2.
"""

from collections.abc import Sequence
from itertools import islice
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from fastdense._choices import MemoryMode, SurvivalMode, SurvivalScale
from fastdense.fusion.dense_block import RecomputedTransition
from fastdense.models.recipe import keeps_recipe
from fastdense.nn import DenseBlock, linear_decay
from fastdense.plain.activation import ActivationName, make_activation
from fastdense.plain.norm import NormName, make_norm


class PlainTransitionDown(nn.Sequential):
    """Norm, activation, 1x1 convolution, dropout, max pool: half the size, as many channels.

    Args:
        channels: in and out.
        drop_rate: probability in [0, 1] that a value is dropped in training.
        norm, act: see :class:`fastdense.nn.DenseBlock`.
    """

    def __init__(
        self, channels: int, drop_rate: float, *, norm: NormName = "batch", act: ActivationName = "relu"
    ) -> None:
        super().__init__()
        self.norm = make_norm("TransitionDown", norm, channels, 2)
        self.relu = make_activation("TransitionDown", act)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.drop = nn.Dropout(drop_rate)
        self.pool = nn.MaxPool2d(2)


class TransitionDown(RecomputedTransition, PlainTransitionDown):
    """:class:`PlainTransitionDown` that saves only its input for backward."""


class FCDenseNet(nn.Module):
    """A U-shaped net of dense blocks without bottleneck.

    Going down, a block's whole output is a skip, and is halved in size. Going up, only the features that a block
    added are enlarged, by a transposed 3x3 convolution, and joined with the skip of their size.

    Args:
        growth_rate: channels ``k`` that each layer adds.
        down_layers: number of layers of each block on the way down; as many blocks go up.
        bottleneck_layers: of the block at the bottom.
        up_layers: of the blocks on the way up, from the bottom.
        in_channels: of the image.
        init_features: channels of the first convolution.
        num_classes: of the result.
        drop_rate: probability in [0, 1] that a new feature is dropped in training.
        survival: stochastic depth, probability in [0, 1] that the last layer of the last block is computed in training;
            it decays linearly over the layers of all blocks. See :class:`fastdense.nn.DenseBlock`.
        survival_mode, survival_scale: see :class:`fastdense.nn.StochasticDepth`.
        memory: memory mode of the blocks, see :class:`fastdense.nn.DenseBlock`.
        norm, act: of the blocks and the transitions down, see :class:`fastdense.nn.DenseBlock`.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes, H, W]``; H and W at least ``2 ** len(down_layers)``.

    Raises:
        ValueError: numbers of blocks that differ, unknown norms or activations, or an image that is too small.

    Example:
        >>> FCDenseNet(4, (2, 2), 2, (2, 2), num_classes=3)(torch.zeros(2, 3, 10, 9)).shape
        torch.Size([2, 3, 10, 9])
    """

    def __init__(
        self,
        growth_rate: int,
        down_layers: Sequence[int],
        bottleneck_layers: int,
        up_layers: Sequence[int],
        *,
        in_channels: int = 3,
        init_features: int = 48,
        num_classes: int = 11,
        drop_rate: float = 0.2,
        survival: float = 1.0,
        survival_mode: SurvivalMode = "batch",
        survival_scale: SurvivalScale = "test",
        memory: MemoryMode = "balanced",
        norm: NormName = "batch",
        act: ActivationName = "relu",
    ) -> None:
        super().__init__()
        if len(down_layers) != len(up_layers):
            raise ValueError(
                f"FCDenseNet: expected up_layers to have {len(down_layers)} entries like down_layers, got {up_layers!r}"
            )

        probabilities = iter(linear_decay(sum(down_layers) + bottleneck_layers + sum(up_layers), survival))

        def block(num_layers: int, channels: int) -> DenseBlock:
            return DenseBlock(
                num_layers,
                channels,
                growth_rate,
                bottleneck=False,
                drop_rate=drop_rate,
                survival=list(islice(probabilities, num_layers)),
                survival_mode=survival_mode,
                survival_scale=survival_scale,
                memory=memory,
                norm=norm,
                act=act,
            )

        self.conv0 = nn.Conv2d(in_channels, init_features, 3, padding=1, bias=False)
        self.down_blocks, self.transitions_down = nn.ModuleList(), nn.ModuleList()
        channels, skips = init_features, []
        for num_layers in down_layers:
            self.down_blocks.append(block(num_layers, channels))
            channels += num_layers * growth_rate
            skips.append(channels)
            self.transitions_down.append(TransitionDown(channels, drop_rate, norm=norm, act=act))
        self.bottleneck = block(bottleneck_layers, channels)
        self.up_blocks, self.transitions_up = nn.ModuleList(), nn.ModuleList()
        new = bottleneck_layers * growth_rate
        for num_layers, skip in zip(up_layers, reversed(skips), strict=True):
            self.transitions_up.append(nn.ConvTranspose2d(new, new, 3, stride=2, bias=False))
            channels = new + skip
            self.up_blocks.append(block(num_layers, channels))
            new = num_layers * growth_rate
        self.classifier = nn.Conv2d(channels + new, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        least = 2 ** len(self.down_blocks)
        if min(x.shape[2:]) < least:
            raise ValueError(f"FCDenseNet: expected input to be at least {least} pixels wide and high, got {x.shape}")
        x = self.conv0(x.contiguous(memory_format=torch.channels_last))  # as the blocks' operators have it
        skips = []
        for block, transition in zip(self.down_blocks, self.transitions_down, strict=True):
            x = block(x)
            skips.append(x)
            x = transition(x)
        before, x = x.shape[1], self.bottleneck(x)
        for block, transition in zip(self.up_blocks, self.transitions_up, strict=True):
            x = torch.cat([centre_crop(transition(x[:, before:]), skip := skips.pop()), skip], 1)
            before, x = x.shape[1], block(x)
        return self.classifier(x)


def centre_crop(x: Tensor, like: Tensor) -> Tensor:
    """The middle of ``x``, of the spatial size of ``like``."""
    top, left = ((size - wanted) // 2 for size, wanted in zip(x.shape[2:], like.shape[2:], strict=True))
    return x[:, :, top : top + like.shape[2], left : left + like.shape[3]]


class FCDenseNetOptions(TypedDict, total=False):
    """Arguments of the published networks; those left out have the defaults of :class:`FCDenseNet`."""

    in_channels: int
    """Channels of the image, 3 by default."""
    num_classes: int
    """Of the result, 11 by default."""
    drop_rate: float
    """Probability that a new feature is dropped in training, 0.2 by default."""
    memory: MemoryMode
    """What the blocks keep for the backward pass."""
    norm: NormName
    """The norms, as of :class:`fastdense.nn.DenseBlock`."""
    act: ActivationName
    """The activation, as of :class:`fastdense.nn.DenseBlock`."""
    init_features: int
    """Channels of the first convolution."""
    survival: float
    """Stochastic depth, as of :class:`FCDenseNet`."""
    survival_mode: SurvivalMode
    """See :class:`fastdense.nn.StochasticDepth`."""
    survival_scale: SurvivalScale
    """See :class:`fastdense.nn.StochasticDepth`."""


@keeps_recipe
def fc_densenet56(**options: Unpack[FCDenseNetOptions]) -> FCDenseNet:
    """FC-DenseNet56, k=12, 1,375,019 parameters at 11 classes."""
    return FCDenseNet(12, (4,) * 5, 4, (4,) * 5, **options)


@keeps_recipe
def fc_densenet67(**options: Unpack[FCDenseNetOptions]) -> FCDenseNet:
    """FC-DenseNet67, k=16, 3,460,475 parameters at 11 classes."""
    return FCDenseNet(16, (5,) * 5, 5, (5,) * 5, **options)


@keeps_recipe
def fc_densenet103(**options: Unpack[FCDenseNetOptions]) -> FCDenseNet:
    """FC-DenseNet103, k=16, 9,318,075 parameters at 11 classes."""
    return FCDenseNet(16, (4, 5, 7, 10, 12), 15, (12, 10, 7, 5, 4), **options)

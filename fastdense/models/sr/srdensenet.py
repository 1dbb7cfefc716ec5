# SPDX-License-Identifier: Apache-2.0
"""SRDenseNet: dense blocks without norms, all of whose results are joined."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdense.models.sr.base import SuperResolutionNet, conv3x3
from fastdense.nn.dense_block import DenseFeatures
from fastdense.nn.sr_dense_block import SRDenseBlock
from fastdense.plain.sr_dense_block import ConvRelu


class SRDenseNet(SuperResolutionNet):
    """Dense blocks whose outputs all reach a bottleneck, then transposed convolutions: SRDenseNet_All.

    Args:
        blocks: number of dense blocks.
        layers: convolutions of a block.
        growth_rate: channels that each of them adds.
        width: channels of the bottleneck and behind it.

    Shape:
        ``[N, 1, H, W]`` to ``[N, 1, 4 * H, 4 * W]``, luminance in [0, 1].

    Reference:
        T. Tong, G. Li, X. Liu, Q. Gao. Image Super-Resolution Using Dense Skip Connections. ICCV 2017, section 3.
    """

    scale = tail_scale = 4
    colours = 1
    halo = 1

    def __init__(self, blocks: int = 8, layers: int = 8, growth_rate: int = 16, width: int = 256) -> None:
        super().__init__()
        features = layers * growth_rate
        self.conv = ConvRelu(1, features)
        self.dense_blocks = DenseFeatures(
            *(SRDenseBlock(features * (at + 1), growth_rate, layers) for at in range(blocks))
        )
        self.bottleneck = nn.Sequential(nn.Conv2d(features * (blocks + 1), width, 1), nn.ReLU())
        up = [nn.ConvTranspose2d(width, width, 3, 2, padding=1, output_padding=1) for _ in range(2)]
        self.deconv = nn.Sequential(up[0], nn.ReLU(), up[1], nn.ReLU())
        self.reconstruction = conv3x3(width, 1)
        self.reach = 1 + blocks * layers

    def parts(self) -> list[nn.Module]:
        return list(self.dense_blocks)

    def settings(self) -> dict[str, Any]:
        features = self.conv.conv.out_channels
        blocks = cast(list[SRDenseBlock], list(self.dense_blocks))
        growth = cast(ConvRelu, blocks[0].block[0]).conv.out_channels if blocks else features
        return {
            "blocks": len(blocks),
            "layers": features // growth,
            "growth_rate": growth,
            "width": self.reconstruction.in_channels,
        }

    def live_values(self) -> tuple[int, int]:
        conv = cast(nn.Conv2d, self.bottleneck[0])
        return 2 * conv.in_channels, 3 * conv.out_channels * self.scale**2

    def trunk(self, x: Tensor) -> Tensor:
        return self.bottleneck(self.dense_blocks(self.conv(x).contiguous(memory_format=torch.channels_last)))

    def tail(self, x: Tensor) -> Tensor:
        return self.reconstruction(self.deconv(x))


def srdensenet(blocks: int = 8, growth_rate: int = 16) -> SRDenseNet:
    """SRDenseNet_All for a scale of 4."""
    return SRDenseNet(blocks, growth_rate=growth_rate)

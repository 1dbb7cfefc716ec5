# SPDX-License-Identifier: Apache-2.0
"""The dense block of SRDenseNet in plain PyTorch."""

import torch
from torch import Tensor, nn


class ConvRelu(nn.Module):
    """A 3x3 convolution and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


class PlainSRDenseBlock(nn.Module):
    """The block of SRDenseNet in plain PyTorch: every layer concatenates the features of the block."""

    def __init__(self, in_channels: int, growth_rate: int, layers: int) -> None:
        super().__init__()
        later = (ConvRelu(growth_rate * at, growth_rate) for at in range(1, layers))
        self.block = nn.Sequential(ConvRelu(in_channels, growth_rate), *later)

    def forward(self, x: Tensor) -> Tensor:
        first, *later = self.block
        features = [first(x)]
        for layer in later:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat([x, *features], 1)

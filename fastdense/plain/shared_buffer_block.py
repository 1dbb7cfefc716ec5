# SPDX-License-Identifier: Apache-2.0
"""A dense block of any layers in plain PyTorch."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class PlainSharedBufferBlock(nn.Module):
    """Layers that each read the concatenation of all features before them."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if len(self.layers) == 0:
            raise ValueError("SharedBufferBlock: expected layers to have at least one module, got none")

    def forward(self, input: Tensor) -> Tensor:
        features = [input]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)

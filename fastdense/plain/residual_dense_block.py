# SPDX-License-Identifier: Apache-2.0
"""The dense block of super-resolution networks in plain PyTorch."""

import copy
from collections import OrderedDict
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdense.plain.activation import ActivationName, make_activation
from fastdense.plain.arguments import check_positive
from fastdense.plain.norm import NormName, make_norm
from fastdense.plain.shared_buffer_block import PlainSharedBufferBlock


class PlainResidualDenseBlock(nn.Module):
    """A residual dense block in plain PyTorch: every layer concatenates all earlier features."""

    block_of_layers: type[PlainSharedBufferBlock] = PlainSharedBufferBlock  # of layers that no operator runs

    def __init__(
        self,
        channels: int = 64,
        growth_rate: int = 32,
        num_layers: int = 4,
        *,
        negative_slope: float = 0.2,
        fusion_kernel: int = 3,
        scale: float = 0.2,
        outer_scale: float = 0.2,
        norm: NormName | None = None,
        act: ActivationName | None = None,
    ) -> None:
        super().__init__()
        check_positive("ResidualDenseBlock", channels=channels, growth_rate=growth_rate, num_layers=num_layers)
        if fusion_kernel not in (1, 3):
            raise ValueError(f"ResidualDenseBlock: expected fusion_kernel to be 1 or 3, got {fusion_kernel!r}")
        activation: Any = nn.LeakyReLU(negative_slope) if act is None else make_activation("ResidualDenseBlock", act)
        convs = [nn.Conv2d(channels + at * growth_rate, growth_rate, 3, padding=1) for at in range(num_layers)]
        if norm is None and type(activation) in (nn.ReLU, nn.LeakyReLU):
            negative_slope = getattr(activation, "negative_slope", 0.0)
            if negative_slope < 0:
                raise ValueError(
                    f"ResidualDenseBlock: expected negative_slope to be at least 0, got {negative_slope!r}"
                )
            for at, conv in enumerate(convs):
                self.add_module(f"conv{at + 1}", conv)
        else:
            self.dense = self.block_of_layers(_layer(conv, norm, activation) for conv in convs)
        width = channels + num_layers * growth_rate
        fusion = nn.Conv2d(width, channels, fusion_kernel, padding=fusion_kernel // 2)
        self.add_module(f"conv{num_layers + 1}", fusion)
        self.negative_slope, self.scale, self.outer_scale = negative_slope, scale, outer_scale

    def forward(self, input: Tensor, outer: Tensor | None = None) -> Tensor:
        *layers, fusion = cast(list[nn.Conv2d], list(self.children()))
        if "dense" in self._modules:
            features = self.dense(input)
        else:
            made = [input]
            for conv in layers:
                made.append(F.leaky_relu(conv(torch.cat(made, 1)), self.negative_slope, inplace=True))
            features = torch.cat(made, 1)
        out = fusion(features) * self.scale + input
        return out if outer is None else out * self.outer_scale + outer

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}, scale={self.scale}, outer_scale={self.outer_scale}"


def _layer(conv: nn.Conv2d, norm: NormName | None, activation: nn.Module) -> nn.Sequential:
    modules: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
    if norm is not None:
        modules["norm"] = make_norm("ResidualDenseBlock", norm, conv.out_channels, 2)
    modules["act"] = copy.deepcopy(activation)
    return nn.Sequential(modules)

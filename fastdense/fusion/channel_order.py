# SPDX-License-Identifier: Apache-2.0
"""Brings the weights of blocks that put new features in front into the order of the shared buffer, and results back."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdense.fusion.checks import NotFusible
from fastdense.ops import Activation, BatchStatistics, LayerWeights, NormWeights, TailWeights


def check_groups(norms: Iterable[Any]) -> None:
    """Raises NotFusible where channels of a group would not be together in the buffer of prepended features."""
    for norm in norms:
        if type(norm) is nn.GroupNorm and 1 < norm.num_groups < norm.num_channels:
            raise NotFusible("it puts new features in front, where group norms would cut other channels")


class PrependedFeatures(NamedTuple):
    """Channels in the order ``y_l, ..., y_1, x`` of layers that make ``growth`` each; the buffer has ``x, y_1 ...``."""

    growth: int
    in_channels: int

    def to_buffer(self, t: Tensor, dim: int) -> Tensor:
        return torch.cat(self._split(t, dim, input_first=False)[::-1], dim)

    def from_buffer(self, t: Tensor, dim: int = 1) -> Tensor:
        return torch.cat(self._split(t, dim, input_first=True)[::-1], dim)

    def _split(self, t: Tensor, dim: int, *, input_first: bool) -> tuple[Tensor, ...]:
        sizes = [self.growth] * ((t.shape[dim] - self.in_channels) // self.growth)
        return t.split([self.in_channels, *sizes] if input_first else [*sizes, self.in_channels], dim)

    def norm(self, norm: NormWeights) -> NormWeights:
        weight, bias, mean, var = (None if t is None else self.to_buffer(t, 0) for t in norm[:4])
        return NormWeights(weight, bias, mean, var, norm.eps, norm.groups)

    def activation(self, act: Activation) -> Activation:
        if act.weight is None or act.weight.numel() == 1:
            return act
        return act._replace(weight=self.to_buffer(act.weight, 0))

    def layer(self, layer: LayerWeights) -> LayerWeights:
        layer = layer._replace(norm1=self.norm(layer.norm1), act1=self.activation(layer.act1))
        if layer.conv1 is None:
            return layer._replace(conv2=self.to_buffer(layer.conv2, 1))
        return layer._replace(conv1=self.to_buffer(layer.conv1, 1))

    def tail(self, tail: TailWeights) -> TailWeights:
        conv = None if tail.conv is None else self.to_buffer(tail.conv, 1)
        return tail._replace(norm=self.norm(tail.norm), act=self.activation(tail.act), conv=conv)

    def statistics(self, statistics: BatchStatistics, channels: int) -> BatchStatistics:
        """Of a block of ``channels``: its own in the modules' order, those of the bottlenecks behind them as before."""
        mean, var = (
            torch.cat([self.from_buffer(t[..., :channels], -1), t[..., channels:]], -1)
            for t in (statistics.mean, statistics.var)
        )
        return BatchStatistics(mean, var)

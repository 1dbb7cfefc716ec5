# SPDX-License-Identifier: Apache-2.0
"""Dense layers, blocks and transitions in plain PyTorch, with torchvision's parameter names."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdense._choices import MEMORY_MODES, MemoryMode, SurvivalMode, SurvivalScale
from fastdense.ops.arguments import check_memory
from fastdense.plain.activation import ActivationName, make_activation
from fastdense.plain.arguments import check_positive, check_spatial_dims
from fastdense.plain.norm import NormName, make_norm
from fastdense.plain.stochastic_depth import StochasticDepth, survivals

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


_AVG_POOL = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


class DenseLayer(nn.Module):
    """One layer of a dense block in plain PyTorch: ``conv2(relu2(norm2(conv1(relu1(norm1(x))))))``.

    Args:
        in_channels: channels ``c`` that the layer reads.
        growth_rate: channels ``k`` that it adds.
        bn_size: width of the bottleneck in units of ``growth_rate``.
        drop_rate: probability in [0, 1] that a new feature is dropped in training.
        bottleneck: False leaves conv1 and norm2 out.
        spatial_dims: 1, 2 or 3.
        stochastic_depth: drops the layer at random. The new channels are ``b * H(x)``: zeros if it is dropped.
        eps, momentum, affine, track_running_stats: of the norms, as in :class:`torch.nn.BatchNorm2d`.
        norm: what ``norm1`` and ``norm2`` are, see :class:`fastdense.nn.DenseBlock`.
        act: what ``relu1`` and ``relu2`` are, see :class:`fastdense.nn.DenseBlock`.

    Example:
        >>> DenseLayer(16, 4)(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int = 32,
        *,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        bottleneck: bool = True,
        spatial_dims: int = 2,
        stochastic_depth: StochasticDepth | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        norm: NormName = "batch",
        act: ActivationName = "relu",
    ) -> None:
        super().__init__()
        check_positive("DenseLayer", in_channels=in_channels, growth_rate=growth_rate, bn_size=bn_size)
        check_spatial_dims("DenseLayer", spatial_dims)
        if not 0 <= drop_rate <= 1:
            raise ValueError(f"DenseLayer: expected drop_rate to be a probability in [0, 1], got {drop_rate!r}")
        conv = _CONV[spatial_dims - 1]
        of_norms = {"eps": eps, "momentum": momentum, "affine": affine, "track_running_stats": track_running_stats}
        width = in_channels
        self.norm1 = make_norm("DenseLayer", norm, in_channels, spatial_dims, **of_norms)
        self.relu1 = make_activation("DenseLayer", act)
        if bottleneck:
            width = bn_size * growth_rate
            self.conv1 = conv(in_channels, width, 1, bias=False)
            self.norm2 = make_norm("DenseLayer", norm, width, spatial_dims, **of_norms)
            self.relu2 = make_activation("DenseLayer", act)
        self.conv2 = conv(width, growth_rate, 3, padding=1, bias=False)
        self.drop_rate = float(drop_rate)
        if stochastic_depth is not None:
            self.stochastic_depth = stochastic_depth

    def forward(self, input: Tensor | Sequence[Tensor]) -> Tensor:
        """New features ``[N, k, spatial]`` of ``[N, c, spatial]`` or of a list of tensors to concatenate."""
        x = input if isinstance(input, Tensor) else torch.cat(list(input), 1)
        if "stochastic_depth" not in self._modules:
            return self.features(x)
        zeros = x.new_zeros(x.shape[0], self.conv2.out_channels, *x.shape[2:])
        return self.stochastic_depth(self.features, x, zeros)

    def features(self, x: Tensor) -> Tensor:
        """New features, whatever stochastic depth says."""
        x = self.relu1(self.norm1(x))
        if "conv1" in self._modules:
            x = self.relu2(self.norm2(self.conv1(x)))
        return F.dropout(self.conv2(x), self.drop_rate, self.training)


class PlainDenseBlock(nn.Module):
    """A dense block in plain PyTorch: every layer concatenates all earlier features."""

    def __init__(
        self,
        num_layers: int,
        in_channels: int,
        growth_rate: int = 32,
        *,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        memory: MemoryMode = "balanced",
        bottleneck: bool = True,
        spatial_dims: int = 2,
        survival: float | Sequence[float] = 1.0,
        survival_mode: SurvivalMode = "batch",
        survival_scale: SurvivalScale = "test",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        norm: NormName = "batch",
        act: ActivationName = "relu",
    ) -> None:
        super().__init__()
        check_positive("DenseBlock", num_layers=num_layers)
        for index, p in enumerate(survivals("DenseBlock", num_layers, survival)):
            layer = DenseLayer(
                in_channels + index * growth_rate,
                growth_rate,
                bn_size=bn_size,
                drop_rate=drop_rate,
                bottleneck=bottleneck,
                spatial_dims=spatial_dims,
                stochastic_depth=StochasticDepth(p, survival_mode, survival_scale) if p < 1 else None,
                eps=eps,
                momentum=momentum,
                affine=affine,
                track_running_stats=track_running_stats,
                norm=norm,
                act=act,
            )
            self.add_module(f"denselayer{index + 1}", layer)
        self.out_channels = in_channels + num_layers * growth_rate
        self.memory = check_memory("DenseBlock", memory, MEMORY_MODES)

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.children():
            features.append(layer(features))
        return torch.cat(features, 1)


class PlainTransition(nn.Sequential):
    """Transition in plain PyTorch: norm, activation, 1x1 convolution, average pool."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        spatial_dims: int = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        norm: NormName = "batch",
        act: ActivationName = "relu",
    ) -> None:
        super().__init__()
        check_positive("Transition", in_channels=in_channels, out_channels=out_channels)
        check_spatial_dims("Transition", spatial_dims)
        dims = spatial_dims - 1
        self.norm = make_norm("Transition", norm, in_channels, spatial_dims, eps=eps, momentum=momentum)
        self.relu = make_activation("Transition", act)
        self.conv = _CONV[dims](in_channels, out_channels, 1, bias=False)
        self.pool = _AVG_POOL[dims](2, 2)

# SPDX-License-Identifier: Apache-2.0
"""Dense layers, blocks and transitions, plain and fused, with torchvision's parameter names."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdense.nn.fused import FusedDenseBlock, FusedSequential, FusedTransition, check_memory
from fastdense.nn.stochastic_depth import StochasticDepth, survivals

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_AVG_POOL = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def _check_positive(op: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{op}: expected {name} to be a positive integer, got {size!r}")


def _check_spatial_dims(op: str, spatial_dims: int) -> None:
    if spatial_dims not in (1, 2, 3):
        raise ValueError(f"{op}: expected spatial_dims to be 1, 2 or 3, got {spatial_dims!r}")


class DenseLayer(nn.Module):
    """One layer of a dense block in plain PyTorch: ``conv2(relu(norm2(conv1(relu(norm1(x))))))``.

    Args:
        in_channels: channels ``c`` that the layer reads.
        growth_rate: channels ``k`` that it adds.
        bn_size: width of the bottleneck in units of ``growth_rate``.
        drop_rate: probability in [0, 1] that a new feature is dropped in training.
        bottleneck: False leaves conv1 and norm2 out.
        spatial_dims: 1, 2 or 3.
        stochastic_depth: leaves the layer out at random: then the new channels are zeros, ``b * H(x)`` in general.
        eps, momentum, affine, track_running_stats: of the norms, as in :class:`torch.nn.BatchNorm2d`.

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
    ) -> None:
        super().__init__()
        _check_positive("DenseLayer", in_channels=in_channels, growth_rate=growth_rate, bn_size=bn_size)
        _check_spatial_dims("DenseLayer", spatial_dims)
        if not 0 <= drop_rate <= 1:
            raise ValueError(f"DenseLayer: expected drop_rate to be a probability in [0, 1], got {drop_rate!r}")
        conv, norm = _CONV[spatial_dims - 1], _NORM[spatial_dims - 1]
        width = in_channels
        self.norm1 = norm(in_channels, eps, momentum, affine, track_running_stats)
        self.relu1 = nn.ReLU(inplace=True)
        if bottleneck:
            width = bn_size * growth_rate
            self.conv1 = conv(in_channels, width, 1, bias=False)
            self.norm2 = norm(width, eps, momentum, affine, track_running_stats)
            self.relu2 = nn.ReLU(inplace=True)
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
        memory: str = "balanced",
        bottleneck: bool = True,
        spatial_dims: int = 2,
        survival: float | Sequence[float] = 1.0,
        survival_mode: str = "batch",
        survival_scale: str = "test",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__()
        _check_positive("DenseBlock", num_layers=num_layers)
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
            )
            self.add_module(f"denselayer{index + 1}", layer)
        self.out_channels = in_channels + num_layers * growth_rate
        self.memory = check_memory(memory)

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.children():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseBlock(FusedDenseBlock, PlainDenseBlock):
    """A dense block on one shared buffer.

    Layer ``l`` maps ``[x_0, ..., x_l]`` to ``k`` new channels, ``H_l`` being norm, ReLU, 1x1, norm, ReLU, 3x3. The
    output is a channels-last tensor holding the input and all new channels.

    Args:
        num_layers: number of layers ``L``.
        in_channels: channels ``C0`` of the input.
        growth_rate: channels ``k`` that each layer adds.
        bn_size: width of the bottleneck in units of ``growth_rate``.
        drop_rate: probability in [0, 1] that a new feature is dropped in training.
        memory: "balanced" keeps ``C0 + L*k + L*bn_size*k`` numbers per pixel for the backward pass, "min" only
            ``C0 + L*k`` and computes one 1x1 product per layer again.
        bottleneck: False for layers of norm, ReLU, 3x3.
        spatial_dims: 1, 2 or 3.
        survival: stochastic depth, probability in [0, 1] that the last layer is computed in training; those before it
            decay linearly towards it, see :func:`linear_decay`. A sequence has one probability for each layer.
        survival_mode: "batch" or "sample", see below.
        survival_scale: "test" or "train", where the factor is, see :class:`StochasticDepth`.
        eps, momentum, affine, track_running_stats: of all norms.

    Shape:
        ``[N, C0, spatial]`` to ``[N, C0 + L*k, spatial]``.

    Note:
        With stochastic depth layer ``l`` appends ``b_l * H_l(x)``. Left out, it appends zeros, which later layers read
        like any other values: their norms see, and their running statistics take up, mean and variance 0 in those
        channels. In "batch" mode a layer left out is not computed, the statistics of its own norms stay, its
        parameters get no gradient (None), and nothing but the zeros is kept for it. "sample" mode computes all layers
        and runs as plain modules in training, with a warning.

        Sub-modules may be replaced, frozen or hooked: where the fused operator cannot stand in for them, the block
        runs plainly and warns once.

    Reference:
        G. Huang et al. Densely Connected Convolutional Networks. CVPR 2017, arXiv:1608.06993, equation 2.

    Example:
        >>> block = DenseBlock(num_layers=3, in_channels=8, growth_rate=4)
        >>> block(torch.zeros(2, 8, 6, 6)).shape
        torch.Size([2, 20, 6, 6])
    """


class PlainTransition(nn.Sequential):
    """Transition in plain PyTorch: norm, ReLU, 1x1 convolution, average pool."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        spatial_dims: int = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        _check_positive("Transition", in_channels=in_channels, out_channels=out_channels)
        _check_spatial_dims("Transition", spatial_dims)
        dims = spatial_dims - 1
        self.norm = _NORM[dims](in_channels, eps, momentum)
        self.relu = nn.ReLU(inplace=True)
        self.conv = _CONV[dims](in_channels, out_channels, 1, bias=False)
        self.pool = _AVG_POOL[dims](2, 2)


class Transition(FusedTransition, PlainTransition):
    """Compression between two dense blocks: ``pool(conv(relu(norm(x))))``, pooling done before the product.

    Average pooling and a 1x1 convolution commute, so the product runs on a quarter of the pixels.

    Args:
        in_channels: channels of the block.
        out_channels: channels behind the transition.
        spatial_dims: 1, 2 or 3.
        eps, momentum: of the norm.

    Shape:
        ``[N, C, spatial]`` to ``[N, out_channels, spatial // 2]``; every spatial size at least 2.

    Example:
        >>> Transition(8, 4)(torch.zeros(2, 8, 6, 6)).shape
        torch.Size([2, 4, 3, 3])
    """


class DenseFeatures(FusedSequential, nn.Sequential):
    """A sequence of modules in which each dense block runs together with the transition or norm behind it."""

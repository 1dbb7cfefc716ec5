# SPDX-License-Identifier: Apache-2.0
"""Highway networks: the authors' convolutional nets for CIFAR and MNIST, and fully connected ones.

Reference:
    R. K. Srivastava, K. Greff, J. Schmidhuber. Highway Networks. 2015, arXiv:1505.00387; Training Very Deep
    Networks. NIPS 2015, arXiv:1507.06228.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from fastdense.models.recipe import keeps_recipe
from fastdense.nn.highway import HighwayConv2d, HighwayLinear
from fastdense.plain.arguments import check_positive
from fastdense.plain.stochastic_depth import check_choice, check_probability


def _plain(in_channels: int, out_channels: int, kernel_size: int, padding: int) -> list[nn.Module]:
    """A plain layer, which highway networks need where the width changes."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return [conv, nn.ReLU(inplace=True)]


def _highways(number: int, channels: int, transform_bias: float) -> list[nn.Module]:
    return [HighwayConv2d(channels, transform_bias=transform_bias) for _ in range(number)]


class HighwayCifar(nn.Module):
    """The authors' 19-layer net for CIFAR: highway layers of 32, 80 and 128 channels between plain ones.

    Args:
        num_classes: outputs of the classifier.
        transform_bias: ``b_T`` of all gates at the start.
        drop_rate: probability in [0, 1] of dropout at the input, behind both poolings and before the classifier.
        in_channels: channels of the images.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``; sizes of at least 4, published for 32.
    """

    def __init__(
        self, num_classes: int = 10, *, transform_bias: float = -2.0, drop_rate: float = 0.2, in_channels: int = 3
    ) -> None:
        super().__init__()
        check_probability("HighwayCifar", "drop_rate", drop_rate)
        layers: list[nn.Module] = [nn.Dropout(drop_rate), *_plain(in_channels, 32, 3, 1)]
        layers += _highways(4, 32, transform_bias)
        channels = 32
        for width in (80, 128):
            layers += [nn.MaxPool2d(2), nn.Dropout(drop_rate), *_plain(channels, width, 3, 1)]
            layers += _highways(5, width, transform_bias)
            channels = width
        layers += _plain(channels, 100, 1, 0)
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        return self.classifier(self.dropout(x))


class HighwayMnist(nn.Module):
    """The authors' 10-layer net for MNIST: a plain 5x5 layer, then 2 + 3 + 3 highway layers with poolings behind.

    Args:
        width: channels of all layers, 32 or 16 in the paper.
        num_classes: outputs of the classifier.
        transform_bias: ``b_T`` of all gates at the start.
        drop_rate: probability in [0, 1] of dropout at the input and before the classifier.
        in_channels: channels of the images.

    Shape:
        ``[N, in_channels, 28, 28]`` to ``[N, num_classes]``.
    """

    def __init__(
        self,
        width: int = 32,
        num_classes: int = 10,
        *,
        transform_bias: float = -1.0,
        drop_rate: float = 0.2,
        in_channels: int = 1,
    ) -> None:
        super().__init__()
        check_probability("HighwayMnist", "drop_rate", drop_rate)
        # Caffe rounds the size of a pooled image up: 24, 12, 6, 3.
        self.features = nn.Sequential(
            nn.Dropout(drop_rate),
            *_plain(in_channels, width, 5, 0),
            *_highways(2, width, transform_bias),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            *_highways(3, width, transform_bias),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            *_highways(3, width, transform_bias),
            nn.MaxPool2d(2, ceil_mode=True),
        )
        self.dropout = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(9 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or tuple(x.shape[2:]) != (28, 28):
            raise ValueError(f"HighwayMnist: expected x to have 28 x 28 pixels, got shape {list(x.shape)}")
        return self.classifier(self.dropout(self.features(x).flatten(1)))


class HighwayMlp(nn.Module):
    """A plain layer followed by fully connected highway layers and a linear classifier.

    Args:
        depth: number of hidden layers, one plain and ``depth - 1`` highway layers.
        width: units of a hidden layer.
        in_features: numbers in a sample.
        num_classes: outputs of the classifier.
        transform_bias: ``b_T`` of all gates at the start.
        activation: "relu" or "tanh", of all hidden layers.

    Shape:
        ``[N, ...]`` with ``in_features`` numbers a sample, to ``[N, num_classes]``.
    """

    def __init__(
        self,
        depth: int = 50,
        width: int = 50,
        in_features: int = 784,
        num_classes: int = 10,
        *,
        transform_bias: float = -2.0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        check_positive("HighwayMlp", depth=depth)
        if depth < 2:
            raise ValueError(f"HighwayMlp: expected depth to be at least 2, got {depth!r}")
        check_choice("HighwayMlp", "activation", activation, ("relu", "tanh"))
        first = nn.Linear(in_features, width)
        nn.init.normal_(first.weight, std=math.sqrt((2 if activation == "relu" else 1) / in_features))
        nn.init.zeros_(first.bias)
        self.hidden = nn.Sequential(
            first,
            nn.ReLU() if activation == "relu" else nn.Tanh(),
            *(HighwayLinear(width, transform_bias=transform_bias, activation=activation) for _ in range(depth - 1)),
        )
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.hidden(x.flatten(1)))


@keeps_recipe
def highway_cifar(
    num_classes: int = 10, transform_bias: float = -2.0, drop_rate: float = 0.2, in_channels: int = 3
) -> HighwayCifar:
    """The authors' net for CIFAR: 2,256,838 parameters at 10 classes, 2,265,928 at 100; see :class:`HighwayCifar`.

    Reference:
        R. K. Srivastava et al. Training Very Deep Networks. NIPS 2015, arXiv:1507.06228, section 3.3.

    Example:
        >>> sum(p.numel() for p in highway_cifar().parameters())
        2256838
    """
    return HighwayCifar(num_classes, transform_bias=transform_bias, drop_rate=drop_rate, in_channels=in_channels)


@keeps_recipe
def highway_mnist(
    width: int = 32,
    num_classes: int = 10,
    transform_bias: float = -1.0,
    drop_rate: float = 0.2,
    in_channels: int = 1,
) -> HighwayMnist:
    """The authors' net for MNIST: 151,690 parameters at width 32, 38,986 at width 16; see :class:`HighwayMnist`.

    Reference:
        R. K. Srivastava et al. Training Very Deep Networks. NIPS 2015, arXiv:1507.06228, section 3.2.

    Example:
        >>> sum(p.numel() for p in highway_mnist(16).parameters())
        38986
    """
    return HighwayMnist(width, num_classes, transform_bias=transform_bias, drop_rate=drop_rate, in_channels=in_channels)


@keeps_recipe
def highway_mlp(
    depth: int = 50,
    width: int = 50,
    in_features: int = 784,
    num_classes: int = 10,
    transform_bias: float = -2.0,
    activation: str = "relu",
) -> HighwayMlp:
    """A fully connected highway network, of 10 to 100 layers in the paper; see :class:`HighwayMlp`.

    Reference:
        R. K. Srivastava et al. Training Very Deep Networks. NIPS 2015, arXiv:1507.06228, section 3.1.

    Example:
        >>> sum(p.numel() for p in highway_mlp(10).parameters())
        85660
    """
    return HighwayMlp(depth, width, in_features, num_classes, transform_bias=transform_bias, activation=activation)

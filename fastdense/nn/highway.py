# SPDX-License-Identifier: Apache-2.0
"""Highway layers: one projection with twice the width, then one pass for the gate."""

import math

import torch
from torch import Tensor, nn

from fastdense.ops.highway_gate import ACTIVATIONS, highway_gate
from fastdense.plain.stochastic_depth import check_choice


def _check(op: str, channels: int, activation: str) -> None:
    check_choice(op, "activation", activation, ACTIVATIONS)
    if channels < 1:
        raise ValueError(f"{op}: expected channels to be positive, got {channels!r}")


def _initialise(weight: Tensor, bias: Tensor, transform_bias: float, activation: str) -> None:
    """He initialisation for ReLU, LeCun's otherwise and for the gate; biases of 0 and ``transform_bias``."""
    channels = weight.shape[0] // 2
    fan_in = weight[0].numel()
    with torch.no_grad():
        weight[:channels].normal_(std=math.sqrt((2 if activation == "relu" else 1) / fan_in))
        weight[channels:].normal_(std=math.sqrt(1 / fan_in))
        bias[:channels].zero_()
        bias[channels:].fill_(transform_bias)


class HighwayConv2d(nn.Module):
    """A convolutional highway layer, ``y = x + T * (H - x)`` with zero padding.

    ``H = act(W_H * x + b_H)`` and ``T = sigmoid(W_T * x + b_T)`` come from one convolution ``conv``: its first
    ``channels`` outputs make ``H``, the rest ``T``.

    Args:
        channels: of input and output.
        kernel_size: odd size of the square kernel.
        transform_bias: ``b_T`` at the start; negative, so that a deep net begins near the identity. The authors
            advise -1, -2 and -3 for about 10, 20 and 30 convolutional layers.
        activation: "relu", "tanh" or "identity".

    Shape:
        ``[N, channels, H, W]`` to the same.

    Raises:
        ValueError: if ``channels`` is not positive, ``kernel_size`` not odd or ``activation`` unknown.

    Reference:
        R. K. Srivastava, K. Greff, J. Schmidhuber. Highway Networks. 2015, arXiv:1505.00387, equation 3; Training
        Very Deep Networks. NIPS 2015, arXiv:1507.06228, section 2.

    Example:
        >>> HighwayConv2d(4)(torch.zeros(2, 4, 5, 5)).shape
        torch.Size([2, 4, 5, 5])
    """

    def __init__(
        self, channels: int, kernel_size: int = 3, *, transform_bias: float = -2.0, activation: str = "relu"
    ) -> None:
        super().__init__()
        _check("HighwayConv2d", channels, activation)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"HighwayConv2d: expected kernel_size to be odd, got {kernel_size!r}")
        self.conv = nn.Conv2d(channels, 2 * channels, kernel_size, padding=kernel_size // 2)
        self.transform_bias = float(transform_bias)
        self.activation = activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        assert self.conv.bias is not None
        _initialise(self.conv.weight, self.conv.bias, self.transform_bias, self.activation)

    def forward(self, x: Tensor) -> Tensor:
        return highway_gate(x, self.conv(x), self.activation)

    def extra_repr(self) -> str:
        return f"transform_bias={self.transform_bias:g}, activation={self.activation!r}"


class HighwayLinear(nn.Module):
    """A fully connected highway layer, ``y = x + T * (H - x)``.

    Args:
        features: of input and output.
        transform_bias: ``b_T`` at the start, see :class:`HighwayConv2d`.
        activation: "relu", "tanh" or "identity".

    Shape:
        ``[N, features]`` to the same.

    Raises:
        ValueError: if ``features`` is not positive or ``activation`` unknown.

    Reference:
        R. K. Srivastava, K. Greff, J. Schmidhuber. Highway Networks. 2015, arXiv:1505.00387, equation 3.

    Example:
        >>> HighwayLinear(4)(torch.zeros(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(self, features: int, *, transform_bias: float = -2.0, activation: str = "relu") -> None:
        super().__init__()
        _check("HighwayLinear", features, activation)
        self.linear = nn.Linear(features, 2 * features)
        self.transform_bias = float(transform_bias)
        self.activation = activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        _initialise(self.linear.weight, self.linear.bias, self.transform_bias, self.activation)

    def forward(self, x: Tensor) -> Tensor:
        return highway_gate(x, self.linear(x), self.activation)

    def extra_repr(self) -> str:
        return f"transform_bias={self.transform_bias:g}, activation={self.activation!r}"

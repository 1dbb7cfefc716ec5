# SPDX-License-Identifier: Apache-2.0
"""Activations that the dense block operator runs behind its norms."""

from typing import NamedTuple

from torch import Tensor


class Activation(NamedTuple):
    """An activation of :mod:`torch.nn`: its name, up to two numbers, and the parameter of PReLU.

    ==================================  =====================================
    ``name``                            ``first``, ``second``
    ==================================  =====================================
    relu, relu6, identity, selu, silu   0, 0
    gelu, gelu_tanh (the approximation) 0, 0
    hardswish, mish, tanh, sigmoid      0, 0
    leaky_relu                          ``negative_slope``, 0
    elu, celu                           ``alpha`` (above 0 for celu), 0
    softplus                            ``beta`` (above 0), ``threshold``
    prelu                               0, 0; ``weight`` is ``[1]`` or ``[C]``
    ==================================  =====================================
    """

    name: str = "relu"
    first: float = 0.0
    second: float = 0.0
    weight: Tensor | None = None


RELU = Activation()
IDENTITY = Activation("identity")

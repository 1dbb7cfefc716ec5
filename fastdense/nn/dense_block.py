# SPDX-License-Identifier: Apache-2.0
"""Dense blocks and transitions that run as one operator."""

from torch import nn

from fastdense.fusion.dense_block import FusedDenseBlock, FusedTransition
from fastdense.fusion.sequential import FusedSequential
from fastdense.plain.dense_block import DenseLayer as DenseLayer
from fastdense.plain.dense_block import PlainDenseBlock, PlainTransition


class DenseBlock(FusedDenseBlock, PlainDenseBlock):
    """A dense block on one shared buffer.

    Layer ``l`` maps ``[x_0, ..., x_l]`` to ``k`` new channels, ``H_l`` being norm, ReLU, 1x1, norm, ReLU, 3x3, or the
    same with another activation. The output is a channels-last tensor holding the input and all new channels.

    Args:
        num_layers: number of layers ``L``.
        in_channels: channels ``C0`` of the input.
        growth_rate: channels ``k`` that each layer adds.
        bn_size: width of the bottleneck in units of ``growth_rate``.
        drop_rate: probability in [0, 1] that a new feature is dropped in training.
        memory: "balanced" saves ``C0 + L*k + L*bn_size*k`` numbers per pixel for backward. "min" saves ``C0 + L*k`` and
            recomputes one 1x1 convolution per layer.
        bottleneck: False for layers of norm, ReLU, 3x3.
        spatial_dims: 1, 2 or 3.
        survival: stochastic depth, probability in [0, 1] that the last layer is computed in training; those before it
            decay linearly towards it, see :func:`linear_decay`. A sequence has one probability for each layer.
        survival_mode: "batch" or "sample", see below.
        survival_scale: "test" or "train", where the factor is, see :class:`StochasticDepth`.
        eps, momentum, affine, track_running_stats: of all norms; instance and group norms have this eps alone.
        norm: "batch", "instance" or "group", or such a name and arguments, as ``("group", {"num_groups": 8})`` or
            ``("instance", {"affine": True})``. A group norm without has ``gcd(channels, 32)`` groups. On a GPU only
            "batch" runs as one operator.
        act: the activation: "relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "silu", "gelu", "gelu_tanh",
            "hardswish", "mish", "softplus", "tanh", "sigmoid" or "identity"; or such a name and arguments, as
            ``("leaky_relu", {"negative_slope": 0.1})``. On a GPU only "relu" runs as one operator.

    Shape:
        ``[N, C0, spatial]`` to ``[N, C0 + L*k, spatial]``.

    Note:
        With stochastic depth, layer ``l`` appends ``b_l * H_l(x)``. A dropped layer appends zeros. Later layers read
        these like any other values: their norms see mean and variance 0 in those channels, and so do their running
        statistics.

        In "batch" mode a dropped layer is not computed. The running statistics of its norms do not change, its
        parameters get no gradient (None), and only the zeros are saved for it. "sample" mode computes all layers, and
        runs as plain modules in training, with a warning.

        Sub-modules may be replaced, frozen or hooked. If the fused operator cannot replace them, the block runs as
        plain modules and warns once.

    Reference:
        G. Huang et al. Densely Connected Convolutional Networks. CVPR 2017, arXiv:1608.06993, equation 2.

    Example:
        >>> block = DenseBlock(num_layers=3, in_channels=8, growth_rate=4)
        >>> block(torch.zeros(2, 8, 6, 6)).shape
        torch.Size([2, 20, 6, 6])
    """


class Transition(FusedTransition, PlainTransition):
    """Compression between two dense blocks: ``pool(conv(act(norm(x))))``, pooled before the convolution.

    Average pooling and a 1x1 convolution commute, so the convolution runs on a quarter of the pixels.

    Args:
        in_channels: channels of the block.
        out_channels: channels after the transition.
        spatial_dims: 1, 2 or 3.
        eps, momentum: of the norm.
        norm: the norm, see :class:`DenseBlock`.
        act: the activation, see :class:`DenseBlock`.

    Shape:
        ``[N, C, spatial]`` to ``[N, out_channels, spatial // 2]``; every spatial size at least 2.

    Example:
        >>> Transition(8, 4)(torch.zeros(2, 8, 6, 6)).shape
        torch.Size([2, 4, 3, 3])
    """


class DenseFeatures(FusedSequential, nn.Sequential):
    """A sequence of modules in which each dense block runs together with the transition or norm after it."""

# SPDX-License-Identifier: Apache-2.0
"""The dense block of super-resolution networks: no norm, local fusion, residual sums."""

from fastdense.fusion.residual_dense_block import FusedResidualDenseBlock
from fastdense.nn.shared_buffer_block import SharedBufferBlock
from fastdense.plain.residual_dense_block import PlainResidualDenseBlock


class ResidualDenseBlock(FusedResidualDenseBlock, PlainResidualDenseBlock):
    """A dense block without norms on one shared buffer, with local fusion and residual sum.

    Layer ``l`` maps ``[x_0, ..., x_l]`` to ``lrelu(conv3x3(.))``; the result is ``scale * conv(all) + x_0``, or
    ``outer_scale`` times that ``+ outer`` where an outer residual is given.

    Args:
        channels: ``C0`` of input and output.
        growth_rate: channels ``k`` that each layer adds.
        num_layers: number of layers ``L``; the convolutions are ``conv1 ... convL`` and the fusion ``conv{L+1}``.
        negative_slope: of LeakyReLU; 0 makes it ReLU.
        fusion_kernel: 3 as in ESRGAN or 1 as in RDN.
        scale: factor of the fusion.
        outer_scale: factor of the block where ``outer`` is given.
        norm: between a layer's convolution and its activation; None for no norm, else see :class:`DenseBlock`.
        act: the activation, see :class:`DenseBlock`; None for LeakyReLU with ``negative_slope``.

    Shape:
        ``[N, C0, H, W]``, and ``outer`` the same, to ``[N, C0, H, W]``.

    Note:
        Saved for backward: ``C0 + L * k`` numbers per pixel. One operator runs LeakyReLU and ReLU without a norm. With
        others, the layers are a :class:`SharedBufferBlock` called ``dense``.

    Raises:
        ValueError: numbers out of their ranges, unknown norms and activations.

    Reference:
        Y. Zhang et al. Residual Dense Network. CVPR 2018, arXiv:1802.08797, equations 4 to 7; X. Wang et al. ESRGAN.
        ECCVW 2018, arXiv:1809.00219, section 3.1.

    Example:
        >>> ResidualDenseBlock(8, 4, 3)(torch.zeros(1, 8, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
    """

    block_of_layers = SharedBufferBlock

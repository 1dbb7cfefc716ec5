# SPDX-License-Identifier: Apache-2.0
"""The dense block of SRDenseNet: no norm, no fusion, and all but its first layer read what the block itself makes."""

from fastdense.fusion.residual_dense_block import FusedSRDenseBlock
from fastdense.plain.sr_dense_block import ConvRelu as ConvRelu
from fastdense.plain.sr_dense_block import PlainSRDenseBlock


class SRDenseBlock(FusedSRDenseBlock, PlainSRDenseBlock):
    """Convolutions of which the first reads everything so far, each other one the block's own features.

    The result is the input and the block's features. Blocks in a row share one buffer, into which every feature is
    written once.

    Reference:
        T. Tong, G. Li, X. Liu, Q. Gao. Image Super-Resolution Using Dense Skip Connections. ICCV 2017, section 3.
    """

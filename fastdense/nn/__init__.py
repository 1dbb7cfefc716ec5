# SPDX-License-Identifier: Apache-2.0
"""Modules: each has parameters and makes one operator call."""

from fastdense.nn.dense_block import DenseBlock, DenseFeatures, DenseLayer, Transition
from fastdense.nn.dual_path import DualPathBlock, DualPathStage
from fastdense.nn.higher_order import HigherOrderNet
from fastdense.nn.highway import HighwayConv2d, HighwayLinear
from fastdense.nn.resample import BicubicResize, BicubicUpsample
from fastdense.nn.residual_dense_block import ResidualDenseBlock
from fastdense.nn.shared_buffer_block import SharedBufferBlock
from fastdense.plain.stochastic_depth import StochasticDepth, linear_decay

__all__ = [
    "BicubicResize",
    "BicubicUpsample",
    "DenseBlock",
    "DenseFeatures",
    "DenseLayer",
    "DualPathBlock",
    "DualPathStage",
    "HigherOrderNet",
    "HighwayConv2d",
    "HighwayLinear",
    "ResidualDenseBlock",
    "SharedBufferBlock",
    "StochasticDepth",
    "Transition",
    "linear_decay",
]

# SPDX-License-Identifier: Apache-2.0
"""Modules: parameters and one operator call."""

from fastdense.nn.dense_block import DenseBlock, DenseFeatures, DenseLayer, Transition
from fastdense.nn.resample import BicubicResize, BicubicUpsample

__all__ = ["BicubicResize", "BicubicUpsample", "DenseBlock", "DenseFeatures", "DenseLayer", "Transition"]

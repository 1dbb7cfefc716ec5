# SPDX-License-Identifier: Apache-2.0
"""Modules: parameters and one operator call."""

from fastdense.nn.dense_block import DenseBlock, DenseFeatures, DenseLayer, Transition

__all__ = ["DenseBlock", "DenseFeatures", "DenseLayer", "Transition"]

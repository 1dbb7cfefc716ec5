# SPDX-License-Identifier: Apache-2.0
"""Weights of classifiers: those that torchvision and timm publish, and files of any known library."""

from fastdense.models.weights.loading import first_convolution, last_layer, load_state
from fastdense.models.weights.published import (
    DenseNet121_Weights,
    DenseNet161_Weights,
    DenseNet169_Weights,
    DenseNet201_Weights,
    PublishedWeights,
)
from fastdense.models.weights.sources import Source, WeightsLike, find_weights, read_weights

__all__ = [
    "DenseNet121_Weights",
    "DenseNet161_Weights",
    "DenseNet169_Weights",
    "DenseNet201_Weights",
    "PublishedWeights",
    "Source",
    "WeightsLike",
    "find_weights",
    "first_convolution",
    "last_layer",
    "load_state",
    "read_weights",
]

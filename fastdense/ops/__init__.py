# SPDX-License-Identifier: Apache-2.0
"""Functional operators, one module each; importing it registers their fakes and gradients."""

from fastdense.ops.bicubic import bicubic_resize
from fastdense.ops.dense_block import (
    BatchStatistics,
    LayerWeights,
    NormWeights,
    TailWeights,
    dense_block,
)
from fastdense.ops.dropout_mask import dropout_mask
from fastdense.ops.highway_gate import highway_gate
from fastdense.ops.running_stats import update_running_stats_

__all__ = [
    "BatchStatistics",
    "LayerWeights",
    "NormWeights",
    "TailWeights",
    "bicubic_resize",
    "dense_block",
    "dropout_mask",
    "highway_gate",
    "update_running_stats_",
]

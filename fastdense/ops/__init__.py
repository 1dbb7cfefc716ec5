# SPDX-License-Identifier: Apache-2.0
"""Functional operators, one module each; importing it registers their fakes, gradients and counts."""

from fastdense.ops.activation import Activation
from fastdense.ops.arguments import BatchStatistics, NormWeights
from fastdense.ops.batching import register_batching_rules
from fastdense.ops.bicubic import bicubic_resize
from fastdense.ops.dense_block import LayerWeights, TailWeights, dense_block
from fastdense.ops.dense_block_inference import run_inference as run_inference
from fastdense.ops.dropout_mask import dropout_mask
from fastdense.ops.dual_path import DualPathWeights, ProjectionWeights, dual_path_stage
from fastdense.ops.dual_path import run_stage_inference as run_stage_inference
from fastdense.ops.dual_path_merge import dual_path_merge, dual_path_split
from fastdense.ops.flops import register_flops
from fastdense.ops.highway_gate import highway_gate
from fastdense.ops.mean_join import mean_join
from fastdense.ops.norm_relu_max_pool import norm_relu_max_pool
from fastdense.ops.residual_dense_block import ConvWeights, residual_dense_block
from fastdense.ops.update_running_stats import update_running_stats_

register_flops()

register_batching_rules()

__all__ = [
    "Activation",
    "BatchStatistics",
    "ConvWeights",
    "DualPathWeights",
    "LayerWeights",
    "NormWeights",
    "ProjectionWeights",
    "TailWeights",
    "bicubic_resize",
    "dense_block",
    "dropout_mask",
    "dual_path_merge",
    "dual_path_split",
    "dual_path_stage",
    "highway_gate",
    "mean_join",
    "norm_relu_max_pool",
    "residual_dense_block",
    "update_running_stats_",
]

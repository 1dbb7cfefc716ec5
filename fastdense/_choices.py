# SPDX-License-Identifier: Apache-2.0
"""The values that arguments choose from, as types and as tuples. Light: the command line lists them without torch."""

from typing import Literal, get_args

# What dense blocks, and what dual path blocks, keep for the backward pass.
MemoryMode = Literal["balanced", "min", "recompute"]
DualPathMemoryMode = Literal["balanced", "min", "reversible", "recompute"]
MEMORY_MODES: tuple[MemoryMode, ...] = get_args(MemoryMode)
DUAL_PATH_MEMORY_MODES: tuple[DualPathMemoryMode, ...] = get_args(DualPathMemoryMode)
# In which blocks that no operator can run go on a shared buffer, as plain modules.
SHARED_BUFFER_MODES: tuple[MemoryMode, ...] = ("min", "recompute")

# Stochastic depth: whether a mini-batch or each sample draws, and when branches are scaled.
SurvivalMode = Literal["batch", "sample"]
SurvivalScale = Literal["test", "train"]
SURVIVAL_MODES: tuple[SurvivalMode, ...] = get_args(SurvivalMode)
SURVIVAL_SCALES: tuple[SurvivalScale, ...] = get_args(SurvivalScale)

# Conventions of bicubic resampling, by library.
Preset = Literal["torch", "torch_antialias", "pillow", "pillow12", "opencv", "matlab"]
PRESET_NAMES: tuple[Preset, ...] = get_args(Preset)

# Machines and number formats of the command line; 16-bit types mean autocast.
DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")

# Of `fastdense train`.
TRAIN_MEMORY = (*MEMORY_MODES, "plain")
SCHEDULES = ("cosine", "steps")
AUGMENTATIONS = ("crop", "shift", "none")

# Of `fastdense bench`; `fastdense.bench.nets.VARIANTS` says what a variant is.
BENCH_MODES = ("train", "eval")
BENCH_VARIANTS = (
    "plain",
    "plain-channels-last",
    "memory-efficient",
    "memory-efficient-channels-last",
    "timm",
    "compile",
    "compile-max-autotune",
    "plain-channels-last-graph",
    "balanced",
    "min",
    "balanced-graph",
    "min-graph",
    "reversible",
    "recompute",
    "budget",
    "frozen",
    "onnxruntime",
    "openvino",
)
COMPARED_VARIANTS = ("plain", "plain-channels-last", "memory-efficient", "balanced", "min")
COMPARED_IN_EVAL = ("plain", "plain-channels-last", "balanced", "frozen")
ENGINES = ("onnxruntime", "openvino", "compile")
SWEEP_VARIANTS = ("plain", "memory-efficient", "balanced", "min")
SWEEP_DEPTHS = (40, 70, 100, 130, 160, 190)

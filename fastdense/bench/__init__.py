# SPDX-License-Identifier: Apache-2.0
"""Compares training steps of plain PyTorch and fastdense, process by process.

`run_bench` measures time and memory of the variants of one network, `run_sweep` memory against
depth; `tables` and `plots` show what they return.
"""

from fastdense.bench.nets import VARIANTS, Net
from fastdense.bench.results import BenchConfig, BenchResult, Row
from fastdense.bench.run import run_bench
from fastdense.bench.sweep import SweepConfig, SweepResult, run_sweep

__all__ = [
    "VARIANTS",
    "BenchConfig",
    "BenchResult",
    "Net",
    "Row",
    "SweepConfig",
    "SweepResult",
    "run_bench",
    "run_sweep",
]

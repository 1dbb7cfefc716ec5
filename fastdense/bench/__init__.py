# SPDX-License-Identifier: Apache-2.0
"""Compares time and memory of training steps of plain PyTorch and fastdense.

`run_bench` measures the variants of one network, each in its own process. `run_sweep` measures memory against depth.
The modules `tables` and `plots` show the results.
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

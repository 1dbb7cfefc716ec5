# SPDX-License-Identifier: Apache-2.0
"""``fastdense info``."""

from __future__ import annotations

import argparse

import torch

import fastdense
from fastdense._support import extra
from fastdense.bench.environment import cpu_name, gpu_names, total_memory_gib, usable_cores


def run(options: argparse.Namespace) -> int:
    """Prints what was built and what this machine offers."""
    with extra("cli"):
        from rich.console import Console
        from rich.table import Table
    info = fastdense.build_info()
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "fastdense": info["version"],
        "built with torch": info["torch"],
        "built with CUDA": info["cuda"] or "no (CPU only)",
        "CUDA architectures": info["cuda_arch_list"] or "-",
        "compiler": info["compiler"],
        "torch here": torch.__version__,
        "processor": f"{cpu_name()}, {usable_cores()} cores, {total_memory_gib():.0f} GiB",
        "vector instructions": info["simd"],
        "threads": torch.get_num_threads(),
        "GPUs": ", ".join(gpu_names()) or "none",
        "models": ", ".join(fastdense.models.list()),
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    console = Console()
    console.print(table)
    if info["torch"] != torch.__version__:
        console.print(
            f"built with torch {info['torch']}, but {torch.__version__} is installed; run: "
            "pip install --no-build-isolation --force-reinstall --no-deps fastdense",
            style="yellow",
        )
    return 0

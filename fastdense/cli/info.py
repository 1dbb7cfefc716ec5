# SPDX-License-Identifier: Apache-2.0
"""``fastdense info``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap

from fastdense._build_info import build_commands
from fastdense.cli.arguments import Commands, add_command

HELP = """Show what was built and what this machine offers.

examples:
  fastdense info
  fastdense info --json
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "info", HELP, run)
    parser.add_argument("--json", action="store_true", help="print JSON, with the versions of other packages")


def run(options: argparse.Namespace) -> int:
    """Prints what was built and what this machine offers."""
    import torch

    import fastdense
    from fastdense.bench.environment import cpu_name, describe, gpu_names, total_memory_gib, usable_cores

    if options.json:
        print(json.dumps({**describe(), "models": fastdense.models.list()}, indent=2))
        return 0
    info = fastdense.build_info()
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
    margin, width = max(map(len, rows)) + 2, shutil.get_terminal_size().columns
    for name, value in rows.items():
        print(textwrap.fill(str(value), width, initial_indent=name.ljust(margin), subsequent_indent=" " * margin))
    if info["torch"] != torch.__version__:
        print(
            f"fastdense: built with torch {info['torch']}, but {torch.__version__} is installed; build it again:",
            *build_commands(torch.version.cuda),
            sep="\n",
            file=sys.stderr,
        )
    return 0

# SPDX-License-Identifier: Apache-2.0
"""Measures what ``import fastdense`` takes after ``import torch``: ``python -m benchmarks.import_time --json FILE``.

Fresh interpreters time, in turns, the import of torch and that of fastdense behind it. The first pair is not counted:
it brings the files into the system's cache.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastdense._support import write_json
from fastdense.bench.environment import describe

TARGET = 0.3  # seconds
TIMED = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
PROGRAMS = {"torch": TIMED.format("torch"), "fastdense, after torch": "import torch; " + TIMED.format("fastdense")}


def run(program: str) -> float:
    """Seconds that a fresh interpreter prints."""
    return float(subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    taken: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for count in range(options.rounds + 1):
        for name, program in PROGRAMS.items():
            seconds = run(program)
            if count > 0:
                taken[name].append(seconds)
    medians = {name: statistics.median(samples) for name, samples in taken.items()}
    table = Table("import of", "median, s", "smallest, s")
    for name, samples in taken.items():
        table.add_row(name, f"{medians[name]:.3f}", f"{min(samples):.3f}")
    verdict = "met" if medians["fastdense, after torch"] <= TARGET else "missed"
    Console().print(table, f"target {TARGET} s: {verdict}")
    if options.json:
        write_json(options.json, {"environment": describe(), "samples": taken, "medians": medians, "target": TARGET})


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""``fastdense demo``: the main job in a few minutes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastdense._choices import COMPARED_VARIANTS
from fastdense._support import Interrupted, write_json
from fastdense.cli.arguments import Commands, add_command, add_threads
from fastdense.cli.terminal import console, progress

if TYPE_CHECKING:
    from fastdense.train import TrainResult

TARGET_ACCURACY = 0.98

HELP = """Show the benchmark and a training run.

Benchmarks DenseNet-121 on real photographs, then trains a DenseNet-BC on the digits. Takes a few minutes on two
cores.

example:
  fastdense demo --out runs/demo

Exit code 1 if a benchmark row failed or the accuracy stays below 98 %.
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "demo", HELP, run)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: %(default)s")
    add_threads(parser)


def run(options: argparse.Namespace) -> int:
    """Benchmarks DenseNet-121 on photographs, then trains on the digits; ends with table, accuracy and plot."""
    from fastdense.bench import BenchConfig, Net, run_bench
    from fastdense.bench.plots import save_bench
    from fastdense.bench.run import count_ticks
    from fastdense.bench.tables import print_bench

    config = BenchConfig(
        net=Net("densenet121"), variants=COMPARED_VARIANTS, steps=3, warmup=2, memory_steps=2, threads=options.threads
    )
    try:
        with progress("bench DenseNet-121", count_ticks(config)) as tick:
            result = run_bench(config, tick)
        plot = options.out / "densenet121.png"
        save_bench(result, plot)
        write_json(options.out / "densenet121.json", result.to_json())
        trained = train_digits(options.out / "digits", options.threads)
    except Interrupted:
        raise Interrupted("stopped. The demonstration starts from the beginning:", resumes=False) from None
    print_bench(result, console())
    accuracy = trained.test_accuracy
    print(f"\nDenseNet-BC (L=22, k=12) on the digits: test accuracy {100 * accuracy:.2f} %")
    print(f"plot: {plot}")
    if accuracy < TARGET_ACCURACY:
        print(f"expected an accuracy of at least {100 * TARGET_ACCURACY:.0f} %")
    return 0 if result.ok and accuracy >= TARGET_ACCURACY else 1


def train_digits(out: Path, threads: int) -> TrainResult:
    """Trains a small DenseNet-BC on scikit-learn's digits from scratch."""
    from fastdense.train import TrainConfig, train

    config = TrainConfig(
        model="densenet_cifar",
        model_kwargs={"depth": 22, "growth_rate": 12},
        data="digits",
        epochs=15,
        out=out,
        threads=threads,
        fresh=True,
    )
    return train(config)

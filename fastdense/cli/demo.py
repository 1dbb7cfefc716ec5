# SPDX-License-Identifier: Apache-2.0
"""``fastdense demo``: the main job in a few minutes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastdense.bench import BenchConfig, Net, run_bench
from fastdense.bench.run import count_ticks
from fastdense.cli.bench import console, progress
from fastdense.cli.parser import BENCH_VARIANTS

TARGET_ACCURACY = 0.98


def run(options: argparse.Namespace) -> int:
    """Benchmarks DenseNet-121 on photographs, then trains on the digits; ends with table, accuracy and plot."""
    from fastdense._support import write_json
    from fastdense.bench.plots import save_bench
    from fastdense.bench.tables import print_bench

    config = BenchConfig(
        net=Net("densenet121"), variants=BENCH_VARIANTS, steps=5, warmup=2, memory_steps=2, threads=options.threads
    )
    with progress("bench DenseNet-121", count_ticks(config)) as tick:
        result = run_bench(config, tick)
    plot = options.out / "densenet121.png"
    save_bench(result, plot)
    write_json(options.out / "densenet121.json", result.to_json())
    trained = train_digits(options.out / "digits", options.threads)
    print_bench(result, console())
    accuracy = trained.test_accuracy
    print(f"\nDenseNet-BC (L=22, k=12) on the digits: test accuracy {100 * accuracy:.2f} %")
    print(f"plot: {plot}")
    if accuracy < TARGET_ACCURACY:
        print(f"expected an accuracy of at least {100 * TARGET_ACCURACY:.0f} %")
    return 0 if result.ok and accuracy >= TARGET_ACCURACY else 1


def train_digits(out: Path, threads: int) -> Any:
    """Trains a small DenseNet-BC on scikit-learn's digits from scratch."""
    from fastdense.train import TrainConfig, train

    config = TrainConfig(
        model="densenet_cifar",
        model_kwargs={"depth": 22, "growth_rate": 12},
        data="digits",
        epochs=30,
        out=out,
        threads=threads,
        fresh=True,
    )
    return train(config)

# SPDX-License-Identifier: Apache-2.0
"""``fastdense bench``."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from fastdense._support import InputError, check_output, extra, write_json
from fastdense.bench import BenchConfig, Net, SweepConfig, run_bench, run_sweep
from fastdense.bench.nets import MEMORY_MODES, VARIANTS, known_nets
from fastdense.bench.run import count_ticks
from fastdense.bench.sweep import SWEEP_VARIANTS


def run(options: argparse.Namespace) -> int:
    """Measures, then prints, writes and draws the result."""
    return run_depth_sweep(options) if options.sweep else run_comparison(make_config(options), options)


def make_config(options: argparse.Namespace) -> BenchConfig:
    """Checks the options and fills in what depends on the model."""
    from fastdense.cli.parser import BENCH_VARIANTS

    if options.model not in known_nets():
        raise InputError(f"bench: expected --model to be one of {', '.join(known_nets())}, got {options.model!r}")
    net = Net(options.model, options.depth, options.growth_rate)
    variants = options.variants or BENCH_VARIANTS
    if options.memory:
        unwanted = [v for v in options.variants or () if v in MEMORY_MODES and v not in options.memory]
        if unwanted:
            raise InputError(f"bench: expected --memory to include {unwanted[0]} of --variants, got {options.memory}")
        variants = tuple(v for v in variants if v not in MEMORY_MODES)
        variants += tuple(v for v in options.memory if v not in variants)
    config = BenchConfig(
        net=net,
        variants=variants,
        batch=options.batch if options.batch is not None else 64 if net.is_cifar else 8,
        size=options.size if options.size is not None else net.default_size,
        device=options.device,
        dtype=options.dtype,
        mode=options.mode,
        steps=options.steps,
        repeats=options.repeats,
        threads=options.threads,
        seed=options.seed,
        memory_batches=options.memory_batches,
        images=options.images,
    )
    for name in ("batch", "size", "steps", "repeats"):
        if getattr(config, name) < 1:
            raise InputError(f"bench: expected --{name} to be at least 1, got {getattr(config, name)}")
    if net.is_cifar and (net.depth < 10 or (net.depth - 4) % 6):
        raise InputError(f"bench: expected --depth to be of the form 6 n + 4 (10, 16, ..., 100), got {net.depth}")
    if net.growth_rate < 1:
        raise InputError(f"bench: expected --growth-rate to be at least 1, got {net.growth_rate}")
    if config.memory_batches and len(set(config.memory_batches)) < 2:
        raise InputError(
            f"bench: expected --memory-batches to be two batch sizes, or 0 for none, got {config.memory_batches}"
        )
    if options.json:
        check_output("bench: expected --json", options.json)
    if options.plot:
        check_output("bench: expected --plot", options.plot, (".png", ".svg", ".pdf"))
    if config.threads < 0:
        raise InputError(f"bench: expected --threads to be at least 0, got {config.threads}")
    graphs = [name for name in config.variants if VARIANTS[name].graph]
    if graphs and (config.device != "cuda" or config.dtype == "float16"):
        raise InputError(
            f"bench: expected {graphs[0]} of --variants to run with --device cuda and without float16, which scales its"
            f" losses on the host, got --device {config.device} --dtype {config.dtype}"
        )
    if config.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError("bench: expected --device to be usable, got cuda without a CUDA GPU; use --device cpu")
    return config


def run_comparison(config: BenchConfig, options: argparse.Namespace) -> int:
    """Runs one benchmark and shows it; options may carry ``json`` and ``plot``."""
    from fastdense.bench.plots import save_bench
    from fastdense.bench.tables import print_bench

    with progress("bench", count_ticks(config)) as tick:
        result = run_bench(config, tick)
    print_bench(result, console())
    if options.json:
        write_json(options.json, result.to_json())
        console().print(f"wrote {options.json}", highlight=False)
    if options.plot:
        save_bench(result, options.plot)
        console().print(f"drew {options.plot}", highlight=False)
    return 0 if result.ok else 1


def run_depth_sweep(options: argparse.Namespace) -> int:
    """Measures memory against depth."""
    from fastdense.bench.plots import save_sweep
    from fastdense.bench.tables import print_sweep

    options.model = "densenet_cifar"
    options.variants = options.variants or SWEEP_VARIANTS
    config = SweepConfig(make_config(options), options.depths)
    for depth in config.depths:
        if depth < 10 or (depth - 4) % 6:
            raise InputError(f"bench: expected --depths to be of the form 6 n + 4 (10, 16, ..., 100), got {depth}")
    with progress("sweep", len(config.depths) * len(config.base.variants)) as tick:
        result = run_sweep(config, tick)
    print_sweep(result, console())
    if options.json:
        write_json(options.json, result.to_json())
    if options.plot:
        save_sweep(result, options.plot)
        console().print(f"drew {options.plot}", highlight=False)
    return 0 if result.ok else 1


def console() -> Any:
    """The terminal; wide enough for the table where the output is a file."""
    with extra("cli"):
        from rich.console import Console
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=140)


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr; yields the callback that moves it by one."""
    with extra("cli"):
        from tqdm import tqdm
    with tqdm(total=total, desc=title, leave=False, dynamic_ncols=True) as bar:

        def tick(what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        yield tick

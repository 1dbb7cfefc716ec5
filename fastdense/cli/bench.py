# SPDX-License-Identifier: Apache-2.0
"""``fastdense bench``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdense._choices import (
    BENCH_MODES,
    BENCH_VARIANTS,
    COMPARED_IN_EVAL,
    COMPARED_VARIANTS,
    DUAL_PATH_MEMORY_MODES,
    ENGINES,
    SWEEP_DEPTHS,
    SWEEP_VARIANTS,
)
from fastdense._support import InputError, Interrupted, check_output, write_json
from fastdense.cli.arguments import Commands, add_command, add_machine, add_model, check_of_cifar, names, numbers
from fastdense.cli.terminal import console, progress

if TYPE_CHECKING:
    from fastdense.bench import BenchConfig

HELP = """Compare time and memory with plain PyTorch.

Compares time and memory of the plain torchvision or timm model, the same with checkpointing, and fastdense's modes.
Each runs in its own process; they take turns, one training step at a time. A timing counts only if all variants reach
the same loss.

examples:
  fastdense bench                                         DenseNet-121, 224 x 224, batch 8
  fastdense bench --model densenet_cifar --depth 100 --batch 64
  fastdense bench --dtype bfloat16 --variants plain-channels-last,balanced
  fastdense bench --mode eval --json eval.json --plot eval.png
  fastdense bench --mode eval --batch 1 --against onnxruntime,openvino
  fastdense bench --sweep depth --plot depth.png          memory against the number of layers

Exit code 1 if a variant failed or its losses disagree. Ctrl-C shows and writes what was measured so far.
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "bench", HELP, run)
    add_model(parser, "densenet121", "densenet121", depth=100)
    parser.add_argument("--batch", type=int, help="images per step (default: 8, or 64 for densenet_cifar)")
    parser.add_argument("--size", type=int, help="side of an image in pixels (default: 224, or 32 for densenet_cifar)")
    parser.add_argument("--mode", choices=BENCH_MODES, default="train", help="whole training steps or eval forwards")
    parser.add_argument(
        "--variants",
        type=names(BENCH_VARIANTS),
        metavar="A,B",
        help=f"from {', '.join(BENCH_VARIANTS)} (default: {','.join(COMPARED_VARIANTS)}; "
        f"with --mode eval: {','.join(COMPARED_IN_EVAL)})",
    )
    parser.add_argument(
        "--against",
        type=names(ENGINES),
        metavar="A,B",
        help=f"add other engines, from {', '.join(ENGINES)}; onnxruntime and openvino with --mode eval on the CPU",
    )
    parser.add_argument(
        "--memory", type=names(DUAL_PATH_MEMORY_MODES), help="fastdense's modes only, e.g. balanced,min"
    )
    parser.add_argument("--budget", metavar="SIZE", help="add fastdense's modes that fit into so much tensor memory")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per repeat (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="fresh starts of all processes (default: %(default)s)")
    parser.add_argument(
        "--memory-batches",
        type=numbers,
        default=(4, 12),
        metavar="M,N",
        help="batch sizes of the memory slope, 0 for none (default: 4,12)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=900.0,
        metavar="S",
        help="seconds that a variant may take for its start or a step before it is given up (default: %(default)g)",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures (default: scikit-image's photographs)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples and the environment")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the result (.png, .svg, .pdf)")
    parser.add_argument("--sweep", choices=("depth",), help="memory against depth of a CIFAR DenseNet-BC")
    parser.add_argument("--depths", type=numbers, default=SWEEP_DEPTHS, metavar="L,L", help="depths of the sweep")
    add_machine(parser)


def run(options: argparse.Namespace) -> int:
    """Measures, then prints, writes and draws the result."""
    return run_depth_sweep(options) if options.sweep else run_comparison(make_config(options), options)


def check_budget(budget: str | None, device: str, mode: str) -> None:
    """Refuses what no training step can be planned for."""
    import torch

    from fastdense.memory.sizes import read_budget

    if budget is None or mode != "train":
        raise InputError("bench: the variant budget needs --budget SIZE, and --mode train")
    try:
        read_budget("bench", budget, torch.device(device))
    except ValueError as error:
        raise InputError(str(error)) from error
    except RuntimeError as error:
        raise InputError(f"bench: {error}") from error


def check_eval(variants: tuple[str, ...], options: argparse.Namespace) -> None:
    """Raises InputError where a variant that only infers is to do something else."""
    from fastdense.bench.nets import VARIANTS

    for name in variants:
        if VARIANTS[name].is_for_eval and (options.mode, options.device, options.dtype) != ("eval", "cpu", "float32"):
            raise InputError(f"bench: expected --mode eval, --device cpu and --dtype float32 with {name}")


def compared(model: str, mode: str) -> tuple[str, ...]:
    """The variants that are compared where none are asked for."""
    from fastdense.models import memory_modes

    if mode != "eval":
        return COMPARED_VARIANTS
    is_b = memory_modes(model) == DUAL_PATH_MEMORY_MODES and model.endswith("b")  # with two last convolutions
    return tuple(name for name in COMPARED_IN_EVAL if name != "frozen" or not is_b)


def make_config(options: argparse.Namespace) -> BenchConfig:
    """Checks the options and fills in what depends on the model."""
    import torch

    from fastdense.bench import VARIANTS, BenchConfig, Net
    from fastdense.bench.nets import known_nets

    if options.model not in known_nets():
        raise InputError(f"bench: expected --model to be one of {', '.join(known_nets())}, got {options.model!r}")
    check_of_cifar("bench", options)
    net = Net(options.model, options.depth, options.growth_rate)
    variants = options.variants or compared(options.model, options.mode)
    variants += tuple(name for name in options.against or () if name not in variants)
    if options.memory:
        unwanted = [v for v in options.variants or () if v in DUAL_PATH_MEMORY_MODES and v not in options.memory]
        if unwanted:
            raise InputError(f"bench: expected --memory to include {unwanted[0]} of --variants, got {options.memory}")
        variants = tuple(v for v in variants if v not in DUAL_PATH_MEMORY_MODES)
        variants += tuple(v for v in options.memory if v not in variants)
    if options.budget and "budget" not in variants:
        variants = (*variants, "budget")
    if "budget" in variants:
        check_budget(options.budget, options.device, options.mode)
    check_eval(variants, options)
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
        budget=options.budget or "",
        timeout=options.timeout,
    )
    for name in ("batch", "size", "steps", "repeats"):
        if getattr(config, name) < 1:
            raise InputError(f"bench: expected --{name} to be at least 1, got {getattr(config, name)}")
    if not config.timeout > 0:
        raise InputError(f"bench: expected --timeout to be positive, got {config.timeout:g}")
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
    graphs = [name for name in config.variants if VARIANTS[name].graph]
    if graphs and (config.device != "cuda" or config.dtype == "float16"):
        raise InputError(
            f"bench: expected {graphs[0]} of --variants to run with --device cuda and without float16, which scales its"
            f" losses on the host, got --device {config.device} --dtype {config.dtype}"
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("bench: device 'cuda' is not available; use --device cpu")
    return config


def run_comparison(config: BenchConfig, options: argparse.Namespace) -> int:
    """Runs one benchmark and shows it."""
    from fastdense.bench import run_bench
    from fastdense.bench.plots import save_bench
    from fastdense.bench.run import count_ticks
    from fastdense.bench.tables import print_bench

    with progress("bench", count_ticks(config)) as tick:
        result, stop = _measured(lambda: run_bench(config, tick))
    print_bench(result, console())
    return _finish(result, stop, options, save_bench)


def run_depth_sweep(options: argparse.Namespace) -> int:
    """Measures memory against depth."""
    from fastdense.bench import SweepConfig, run_sweep
    from fastdense.bench.plots import save_sweep
    from fastdense.bench.tables import print_sweep

    options.model = "densenet_cifar"
    options.variants = options.variants or SWEEP_VARIANTS
    config = SweepConfig(make_config(options), options.depths)
    for depth in config.depths:
        if depth < 10 or (depth - 4) % 6:
            raise InputError(f"bench: expected --depths to be of the form 6 n + 4 (10, 16, ..., 100), got {depth}")
    with progress("sweep", len(config.depths) * len(config.base.variants)) as tick:
        result, stop = _measured(lambda: run_sweep(config, tick))
    print_sweep(result, console())
    return _finish(result, stop, options, save_sweep)


def _measured(measure: Callable[[], Any]) -> tuple[Any, Interrupted | None]:
    """The result, or what there is of it when Ctrl-C was pressed."""
    try:
        return measure(), None
    except Interrupted as stop:
        return stop.result, stop


def _finish(
    result: Any, stop: Interrupted | None, options: argparse.Namespace, save: Callable[[Any, Path], None]
) -> int:
    """Writes and draws what the options ask for."""
    if options.json:
        write_json(options.json, result.to_json())
        print(f"wrote {options.json}")
    if options.plot:
        save(result, options.plot)
        print(f"drew {options.plot}")
    if stop:
        raise stop
    return 0 if result.ok else 1

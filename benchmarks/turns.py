# SPDX-License-Identifier: Apache-2.0
"""What measurements of whole networks share: processes of their own, variants in turns, ratios to the better plain."""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastdense._support import write_json
from fastdense.bench.environment import describe
from fastdense.bench.memory import RETURN_FREED_MEMORY
from fastdense.bench.nets import PLAIN_LAYOUTS

Row = dict[str, Any]


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function of a module, called in a fresh process that returns freed memory."""
    os.environ.update(RETURN_FREED_MEMORY)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def check_equal(name: str, expected: float, actual: float, tolerance: float = 1e-4) -> None:
    """A wrong result is not reported."""
    if abs(actual - expected) > tolerance * max(1.0, abs(expected)):
        raise SystemExit(f"{name}: expected {expected}, got {actual}")


def row_of_values(what: str, values: Mapping[str, float]) -> Row:
    """One value a variant, and the ratios of those that are not plain to the better plain layout."""
    plain = min(values[layout] for layout in PLAIN_LAYOUTS)
    ratios = {variant: value / plain for variant, value in values.items() if variant not in PLAIN_LAYOUTS}
    return {"what": what, "values": dict(values), "ratios": ratios}


def row_of_times(what: str, runs: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> Row:
    """Milliseconds of variants that take turns: medians, and medians of the ratios within one round."""
    samples: dict[str, list[float]] = {variant: [] for variant in runs}
    for index in range(warm_up + rounds):
        for variant, run in runs.items():
            start = time.perf_counter()
            run()
            if index >= warm_up:
                samples[variant].append(1000 * (time.perf_counter() - start))
    medians = {variant: statistics.median(taken) for variant, taken in samples.items()}
    plain = samples[min(PLAIN_LAYOUTS, key=lambda layout: medians[layout])]
    ratios = {
        variant: statistics.median(ours / theirs for ours, theirs in zip(taken, plain, strict=True))
        for variant, taken in samples.items()
        if variant not in PLAIN_LAYOUTS
    }
    return {"what": what, "values": medians, "ratios": ratios, "samples": samples}


def training_step(net: nn.Module, x: Tensor) -> Callable[[], float]:
    """A training step without the optimizer; returns its loss."""

    def step() -> float:
        net.zero_grad(set_to_none=True)
        loss = net(x).logsumexp(1).mean()
        loss.backward()
        return loss.item()

    return step


def parser_of(doc: str, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and the environment")
    parser.add_argument("--rounds", type=int, default=rounds, help="of the timed runs; default: %(default)s")
    return parser


def report(rows: Sequence[Row], json: Path | None, **settings: Any) -> None:
    """Prints a table, and writes the figures where that is wanted."""
    table = Table("what", "variant", "value", "ratio")
    for row in rows:
        for index, (variant, value) in enumerate(row["values"].items()):
            ratio = row["ratios"].get(variant)
            table.add_row("" if index else row["what"], variant, f"{value:.1f}", f"{ratio:.2f}" if ratio else "")
        table.add_section()
    Console().print(table)
    if json:
        write_json(json, {"environment": describe(), **settings, "rows": list(rows)})

# SPDX-License-Identifier: Apache-2.0
"""Results as tables for a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastdense._support import extra
from fastdense.bench.environment import hardware_line
from fastdense.bench.results import LOSS_TOLERANCE, BenchConfig, BenchResult, Row
from fastdense.bench.sweep import SweepResult

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_DASH = "-"


def print_bench(result: BenchResult, console: Console) -> None:
    """Prints a benchmark: heading, table, what the numbers mean, and what failed and why."""
    console.print(f"\n{bench_title(result)}", style="bold", highlight=False, markup=False)
    console.print(bench_table(result))
    for note in _notes(result):
        console.print(note, style="dim", highlight=False, markup=False)
    for line in result.skipped:
        console.print(f"skipped a corrupt picture: {line}", style="yellow", markup=False)
    for row in result.rows:
        for error in filter(None, (row.time_error, row.memory_error)):
            console.print(f"{row.variant}: {error}", style="red", highlight=False, markup=False)


def bench_title(result: BenchResult) -> str:
    """Network, batch, type and machine in one line."""
    hardware = hardware_line(result.environment, result.config.device)
    return f"{workload_line(result.config)}, {hardware}"


def workload_line(config: BenchConfig) -> str:
    """What one step is, e.g. ``DenseNet-121, training step, 8 x 224 x 224, float32``."""
    kind = "training step" if config.mode == "train" else "eval forward"
    dtype = config.dtype + (" autocast" if config.dtype != "float32" else "")
    return f"{config.net.label}, {kind}, {config.batch} x {config.size} x {config.size}, {dtype}"


def bench_table(result: BenchResult) -> Table:
    """The measured numbers, one variant a line."""
    with extra("cli"):
        from rich import box
        from rich.table import Table
        from rich.text import Text
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("variant", no_wrap=True)
    for heading in (
        "ms/step [p20-p80]",
        "images/s",
        "time ratio",
        "peak MiB",
        "MiB/image",
        "memory ratio",
        "loss diff",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    if result.ceilings:
        for heading in ("GB/s", "of floor"):
            table.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows:
        style = "red" if row.time_error else "bold" if row.variant in ("balanced", "min") else ""
        table.add_row(*(Text(cell) for cell in _cells(result, row)), style=style)
    return table


def _cells(result: BenchResult, row: Row) -> list[str]:
    """The line of one variant as text."""
    numbers = result.summary(row)
    difference = row.loss_difference
    loss = _DASH if difference is None else f"{difference:.1e}"
    floor = [_number(numbers["gb_per_second"], 0), _number(numbers["floor_share"], 2)] if result.ceilings else []
    if row.time_error:
        return [row.variant, _short_reason(row), *[_DASH] * 5, loss, *floor]
    ms = numbers["ms_per_step"]
    return [
        row.variant,
        f"{ms['median']:.{_digits(ms['median'])}f} "
        f"[{ms['p20']:.{_digits(ms['p20'])}f}-{ms['p80']:.{_digits(ms['p80'])}f}]",
        f"{numbers['images_per_second']:.1f}",
        _number(numbers["time_ratio"], 2),
        _number(row.peak_mib, 0),
        "failed" if row.memory_error else _number(row.slope, 1),
        _number(numbers["memory_ratio"], 2),
        loss,
        *floor,
    ]


def _short_reason(row: Row) -> str:
    """What the time column says where there is no time."""
    return "losses disagree" if "disagree" in (row.time_error or "") else "failed"


def _number(value: float | None, digits: int) -> str:
    return _DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _digits(milliseconds: float) -> int:
    """Decimals that leave about three figures."""
    return 0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2


def _notes(result: BenchResult) -> list[str]:
    """Where images and labels come from, what the ratios refer to, how sure the losses are."""
    config = result.config
    first, later = LOSS_TOLERANCE[config.dtype]
    notes = [f"{result.images}, labels arbitrary but fixed; same images and weights for all."]
    if result.time_baseline:
        notes.append(
            f"time ratio: median over {len(result.time_baseline.seconds)} rounds, to"
            f" {result.time_baseline.variant}, the faster plain layout."
        )
    if result.memory_baseline:
        batches = " and ".join(map(str, config.memory_batches))
        what = "allocator peak" if config.device == "cuda" else "peak resident memory"
        notes.append(f"MiB/image: slope of {what} between batch {batches}; ratio to {result.memory_baseline.variant}.")
    if result.ceilings:
        notes.append(
            "of floor: the least time of the variant's kernels over its time, at the"
            f" {result.ceilings.bytes_per_second / 1e12:.2f} TB/s and {result.ceilings.flops_per_second / 1e12:.0f}"
            " TFLOP/s that a copy and a product reach here; GB/s: its compulsory traffic over its time."
        )
    differences = [row.loss_difference for row in result.rows if row.loss_difference is not None]
    if differences:
        notes.append(
            f"largest loss difference in {config.warmup} steps: {max(differences):.1e} (relative;"
            f" allowed {first:g} in step 1, {later:g} later)."
        )
    return notes


def print_sweep(result: SweepResult, console: Console) -> None:
    """Prints a sweep: one depth a line, one variant a column."""
    with extra("cli"):
        from rich import box
        from rich.table import Table
    base = result.config.base
    name = base.net.label.partition(" (")[0]
    heading = (
        f"{name} (k={base.net.growth_rate}), training step, batch {base.batch}, {base.dtype}:"
        f" MiB above the model itself, {hardware_line(result.environment, base.device)}"
    )
    console.print(f"\n{heading}", style="bold", highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("depth", justify="right")
    for variant in base.variants:
        table.add_column(variant, justify="right", no_wrap=True)
    found = {(point.variant, point.depth): point for point in result.points}
    for depth in sorted({point.depth for point in result.points}):
        points = [found[variant, depth] for variant in base.variants]
        cells = ["[red]failed[/red]" if p.error else _number(p.step_mib, 0) for p in points]
        table.add_row(str(depth), *cells)
    console.print(table)
    for point in result.points:
        if point.error:
            console.print(f"{point.variant}, depth {point.depth}: {point.error}", style="red", markup=False)

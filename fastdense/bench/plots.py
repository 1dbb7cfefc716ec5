# SPDX-License-Identifier: Apache-2.0
"""Results as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdense._support import extra, write_atomically
from fastdense.bench.environment import hardware_line
from fastdense.bench.results import BenchResult
from fastdense.bench.sweep import SweepResult
from fastdense.bench.tables import bench_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {
    "plain": "#9aa5b1",
    "plain-channels-last": "#7b8794",
    "memory-efficient": "#d9a441",
    "memory-efficient-channels-last": "#b9852b",
    "compile": "#7a5ea8",
    "balanced": "#1f7a5c",
    "min": "#2d9cdb",
    "reversible": "#c0582f",
    "recompute": "#5a6acf",
}


def save_bench(result: BenchResult, path: Path) -> None:
    """Draws memory per image and time per step of every variant as bars and writes the picture."""
    figure = _figure(10, 1.6 + 0.5 * len(result.rows))
    rows = list(reversed(result.rows))
    names = [row.variant for row in rows]
    memory, time = figure.subplots(1, 2, sharey=True)
    slopes = [row.slope for row in rows]
    milliseconds = [1e3 * row.median if row.seconds else None for row in rows]
    _bars(memory, names, slopes, "MiB per image", ".0f")
    _bars(time, names, milliseconds, "ms per step", ".0f")
    figure.suptitle(bench_title(result), fontsize=11)
    _save(figure, path)


def _bars(axes: Any, names: list[str], values: list[float | None], label: str, form: str) -> None:
    axes.set_xlabel(label)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    shown = [value or 0.0 for value in values]
    axes.barh(names, shown, color=[_COLOURS.get(name, "#555555") for name in names])
    room = max(shown, default=0.0) or 1.0
    axes.set_xlim(0, 1.15 * room)
    for at, value in enumerate(values):
        text = "not measured" if value is None else format(value, form)
        axes.text((value or 0.0) + 0.01 * room, at, text, va="center", fontsize=9)


def save_front(
    front: list[tuple[int, float]],
    chosen: tuple[int, float],
    rivals: Sequence[tuple[str, int, float]],
    title: str,
    path: Path,
) -> None:
    """Draws peaks in bytes against seconds a step, the chosen one marked, beside others'; writes the picture."""
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    points = sorted(front)
    memory, time = [peak / 2**30 for peak, _ in points], [1e3 * seconds for _, seconds in points]
    axes.plot(memory, time, "o-", color=_COLOURS["balanced"], label="fastdense")
    at = (chosen[0] / 2**30, 1e3 * chosen[1])
    axes.plot(*at, "o", color=_COLOURS["reversible"], markersize=9, label="the plan")
    for name, peak, seconds in rivals:
        colour = _COLOURS["compile" if name.startswith("compile") else "plain-channels-last"]
        axes.plot(peak / 2**30, 1e3 * seconds, "s", color=colour)
        axes.annotate(name, (peak / 2**30, 1e3 * seconds), (6, 4), textcoords="offset points", color=colour)
    axes.margins(0.12)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("peak of tensor memory, GiB")
    axes.set_ylabel("ms per step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(title, fontsize=11)
    _save(figure, path)


def save_sweep(result: SweepResult, path: Path) -> None:
    """Draws memory above the model against the number of layers, one line a variant."""
    figure = _figure(7.5, 5)
    axes = figure.subplots()
    base = result.config.base
    for variant in base.variants:
        points = result.line(variant)
        depths = [point.depth for point in points]
        memory = [(point.step_mib or 0.0) / 1024 for point in points]
        colour = _COLOURS.get(variant, "#555555")
        axes.plot(depths, memory, marker="o", color=colour)
        if points:
            axes.annotate(
                variant, (depths[-1], memory[-1]), (6, 0), textcoords="offset points", va="center", color=colour
            )
    axes.set_xlabel("layers")
    axes.set_ylabel("GiB above the model itself")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"DenseNet-BC k={base.net.growth_rate}, training step, batch {base.batch}, {base.dtype}, "
        f"{hardware_line(result.environment, base.device)}",
        fontsize=10,
    )
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    with extra("cli"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    picture = BytesIO()
    figure.savefig(picture, format=path.suffix.lstrip(".") or "png", dpi=150)
    write_atomically(path, lambda file: file.write(picture.getvalue()))

# SPDX-License-Identifier: Apache-2.0
"""What a benchmark measured, and the numbers derived from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastdense._extension import build_info
from fastdense.bench.memory import mib_per_image
from fastdense.bench.nets import PLAIN_LAYOUTS, VARIANTS, Net
from fastdense.bench.roofline import Ceilings, training_roofline

SCHEMA = 1

# Largest relative difference of losses that rounding explains: (first step, later steps).
# The first step compares one forward pass; each update then amplifies what differs.
LOSS_TOLERANCE = {
    "float32": (1e-3, 2e-2),
    "bfloat16": (3e-2, 1e-1),
    "float16": (1e-2, 5e-2),
}


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Configuration of a benchmark.

    Attributes:
        net: the network.
        variants: keys of `fastdense.bench.nets.VARIANTS`, in the order of the table.
        batch: images per timed step.
        size: side of an image in pixels.
        device, dtype, mode, threads, seed, lr: as in `fastdense.bench.job.Job`.
        steps: timed steps per variant and repeat.
        repeats: how often all workers start afresh.
        warmup: untimed steps before, whose losses are compared; at least 1.
        memory_batches: batch sizes of the memory slope; empty leaves it out.
        memory_steps: steps before a peak is read; at least 2.
        budget: of tensor memory, for the variant of that name.
        images: a folder of pictures; None takes scikit-image's.
        timeout: seconds that one step may take.
        faults: for tests only: a fault by variant.
    """

    net: Net
    variants: tuple[str, ...]
    batch: int = 8
    size: int = 224
    device: str = "cpu"
    dtype: str = "float32"
    mode: str = "train"
    steps: int = 10
    repeats: int = 1
    warmup: int = 3
    threads: int = 0
    seed: int = 0
    lr: float = 0.01
    memory_batches: tuple[int, ...] = (4, 12)
    memory_steps: int = 3
    budget: str = ""
    images: Path | None = None
    timeout: float = 900.0
    faults: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Row:
    """One variant's samples.

    Attributes:
        variant: its name.
        losses: of the compared steps of the first repeat.
        seconds: of every timed step; step i of all rows ran in the same round.
        peak_mib: peak memory at the timed batch size, the largest of the repeats.
        peaks: peak memory in MiB of a fresh process, by batch size.
        loss_difference: the largest relative difference to the reference's losses.
        time_error: why no time can be given.
        memory_error: why no memory slope can be given.
    """

    variant: str
    parameters: int = 0
    threads: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_mib: float | None = None
    peaks: dict[int, float] = dataclasses.field(default_factory=dict)
    loss_difference: float | None = None
    time_error: str | None = None
    memory_error: str | None = None

    @property
    def median(self) -> float:
        """Median seconds per step; infinite without samples."""
        return float(np.median(self.seconds)) if self.seconds else math.inf

    @property
    def slope(self) -> float | None:
        """Memory per image in MiB, or None where it was not measured."""
        return mib_per_image(self.peaks) if len(self.peaks) > 1 else None

    def fail(self, reason: str) -> None:
        """Marks the row's times as failed or invalid."""
        self.time_error = reason
        self.seconds = []


@dataclasses.dataclass
class BenchResult:
    """A finished benchmark."""

    config: BenchConfig
    environment: dict[str, Any]
    images: str
    skipped: list[str]
    rows: list[Row]
    ceilings: Ceilings | None = None
    interrupted: bool = False

    @property
    def ok(self) -> bool:
        """Whether every variant gave every number."""
        return not self.interrupted and not any(row.time_error or row.memory_error for row in self.rows)

    @property
    def time_baseline(self) -> Row | None:
        """The faster of the plain layouts."""
        rows = [row for row in self.rows if row.variant in PLAIN_LAYOUTS and row.seconds]
        return min(rows, key=lambda row: row.median, default=None)

    @property
    def memory_baseline(self) -> Row | None:
        """The plain layout that needs less memory per image."""
        rows = [row for row in self.rows if row.variant in PLAIN_LAYOUTS and row.slope]
        return min(rows, key=lambda row: row.slope or math.inf, default=None)

    def summary(self, row: Row) -> dict[str, Any]:
        """The numbers of one line of the table."""
        p20, median, p80 = percentiles(row.seconds)
        fast, small = self.time_baseline, self.memory_baseline
        return {
            "variant": row.variant,
            "ms_per_step": {"median": 1e3 * median, "p20": 1e3 * p20, "p80": 1e3 * p80},
            "images_per_second": self.config.batch / median,
            "peak_mib": row.peak_mib,
            "mib_per_image": row.slope,
            "time_ratio": median_ratio(row.seconds, fast.seconds if fast else []),
            "memory_ratio": row.slope / small.slope if row.slope is not None and small and small.slope else None,
            "max_loss_difference": row.loss_difference,
            **self.against_roofline(row),
            "time_error": row.time_error,
            "memory_error": row.memory_error,
        }

    def against_roofline(self, row: Row) -> dict[str, float | None]:
        """Compulsory traffic over time, and the share of the time that `fastdense.bench.roofline` calls the least."""
        config, variant = self.config, VARIANTS[row.variant]
        floor = None
        if self.ceilings and config.mode == "train" and row.seconds:
            element_size = 4 if config.dtype == "float32" else 2
            # The worker processes choose kernels by the same environment as this one.
            fused = element_size == 2 and build_info()["cuda_kernels"] != "library"
            floor = training_roofline(
                config.net, variant, config.batch, config.size, element_size, self.ceilings, fused
            )
        return {
            "gb_per_second": floor.bytes / row.median / 1e9 if floor else None,
            "floor_share": floor.seconds / row.median if floor else None,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, samples included, as JSON values."""
        fast, small = self.time_baseline, self.memory_baseline
        config = dataclasses.asdict(self.config)
        del config["faults"]
        config["images"] = None if self.config.images is None else str(self.config.images)
        samples = ("parameters", "threads", "losses", "seconds", "peaks")
        return {
            "schema": SCHEMA,
            "kind": "bench",
            "arguments": config,
            "environment": self.environment,
            "ceilings": self.ceilings and dataclasses.asdict(self.ceilings),
            "images": {"source": self.images, "skipped": self.skipped},
            "labels": "arbitrary but fixed",
            "interrupted": self.interrupted,
            "baseline": {
                "time": fast and fast.variant,
                "memory": small and small.variant,
            },
            "rows": [self.summary(row) | {name: getattr(row, name) for name in samples} for row in self.rows],
        }


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile; NaN without samples."""
    if not samples:
        return math.nan, math.nan, math.nan
    p20, p50, p80 = np.percentile(samples, (20, 50, 80))
    return float(p20), float(p50), float(p80)


def median_ratio(samples: Sequence[float], baseline: Sequence[float]) -> float | None:
    """Median of the ratios of samples taken in the same round; None without samples."""
    if not samples or not baseline:
        return None
    return float(np.median(np.divide(samples, baseline)))


def relative_difference(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    """|loss - reference| / |reference| for each step; infinite where a loss is not finite."""
    differences = []
    for loss, expected in zip(losses, reference, strict=True):
        finite = math.isfinite(loss) and math.isfinite(expected)
        scale = max(abs(expected), 1e-12)
        differences.append(abs(loss - expected) / scale if finite else math.inf)
    return differences


def disagreement(losses: Sequence[float], reference: Sequence[float], dtype: str) -> str | None:
    """Says at which step losses differ by more than rounding; None if they agree."""
    first, later = LOSS_TOLERANCE[dtype]
    for step, difference in enumerate(relative_difference(losses, reference)):
        allowed = later if step else first
        if not difference <= allowed:
            return (
                f"losses disagree: expected {reference[step]:.6g} in step {step + 1} to within"
                f" {allowed:g} (relative), got {losses[step]:.6g}"
            )
    return None


def reference_row(rows: Sequence[Row]) -> Row | None:
    """The row whose losses the others must reproduce: plain PyTorch, else the first."""
    plain = [row for row in rows if row.variant in PLAIN_LAYOUTS]
    return next(iter([*plain, *rows]), None)

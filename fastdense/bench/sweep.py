# SPDX-License-Identifier: Apache-2.0
"""Memory of a training step against the depth of a CIFAR DenseNet-BC.

The picture of Pleiss et al., Memory-Efficient Implementation of DenseNets, 2017, arXiv 1707.06990:
what plain PyTorch saves for backward grows with the square of a block's depth, what one shared
buffer saves grows linearly.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fastdense._choices import SWEEP_DEPTHS
from fastdense._support import Interrupted
from fastdense.bench.environment import describe
from fastdense.bench.process import Worker, WorkerError
from fastdense.bench.results import (
    SCHEMA,
    BenchConfig,
    Row,
    disagreement,
    reference_row,
)
from fastdense.bench.run import Tick, make_job, measure_peak, stored_batch


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Configuration of a sweep: the depths, and everything else in `base`.

    Attributes:
        base: a benchmark of `densenet_cifar`; its `batch`, `variants` and `memory_steps` count.
        depths: layers with weights, each 6 n + 4.
    """

    base: BenchConfig
    depths: tuple[int, ...] = SWEEP_DEPTHS

    def at(self, depth: int) -> BenchConfig:
        """The benchmark of one depth."""
        return dataclasses.replace(self.base, net=dataclasses.replace(self.base.net, depth=depth))


@dataclasses.dataclass
class SweepPoint:
    """Memory of one variant at one depth.

    Attributes:
        held_mib: with the model and the batch, before the first step.
        peak_mib: peak over the training steps.
        losses: of these steps.
        error: why there is no number.
    """

    variant: str
    depth: int
    held_mib: float | None = None
    peak_mib: float | None = None
    losses: list[float] = dataclasses.field(default_factory=list)
    error: str | None = None

    @property
    def step_mib(self) -> float | None:
        """What the training step needs above the model itself."""
        if self.error or self.peak_mib is None or self.held_mib is None:
            return None
        return self.peak_mib - self.held_mib


@dataclasses.dataclass
class SweepResult:
    """A finished sweep."""

    config: SweepConfig
    environment: dict[str, Any]
    images: str
    skipped: list[str]
    points: list[SweepPoint]
    interrupted: bool = False

    @property
    def ok(self) -> bool:
        """Whether every point was measured."""
        return not self.interrupted and not any(point.error for point in self.points)

    def line(self, variant: str) -> list[SweepPoint]:
        """The measured points of one variant, in order of depth."""
        return [p for p in self.points if p.variant == variant and p.step_mib is not None]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        base = self.config.base
        return {
            "schema": SCHEMA,
            "kind": "sweep-depth",
            "arguments": {
                "net": dataclasses.asdict(base.net),
                "depths": list(self.config.depths),
                "variants": list(base.variants),
                "batch": base.batch,
                "size": base.size,
                "device": base.device,
                "dtype": base.dtype,
                "threads": base.threads,
                "memory_steps": base.memory_steps,
                "seed": base.seed,
            },
            "environment": self.environment,
            "images": {"source": self.images, "skipped": self.skipped},
            "interrupted": self.interrupted,
            "points": [dataclasses.asdict(point) | {"step_mib": point.step_mib} for point in self.points],
        }


def run_sweep(config: SweepConfig, tick: Tick = lambda _: None) -> SweepResult:
    """Measures peak memory of every variant at every depth, each in a fresh process.

    Args:
        config: what to measure.
        tick: progress callback, called once per point.

    Raises:
        Interrupted: Ctrl-C; ``result`` has the points of the depths that were measured completely.
    """
    points: list[SweepPoint] = []
    interrupted = False
    with stored_batch(config.base, config.base.batch) as (images, photos):
        try:
            for depth in config.depths:
                row = [_measure(config.at(depth), variant, images, tick) for variant in config.base.variants]
                _compare_losses(row, config.base.dtype)
                points += row
        except KeyboardInterrupt:
            if not points:
                raise
            interrupted = True
    result = SweepResult(config, describe(config.base.threads), photos.source, photos.skipped, points, interrupted)
    if interrupted:
        done = f"{len(points) // len(config.base.variants)} of {len(config.depths)} depths"
        raise Interrupted(f"stopped; {done} were measured. To measure all:", resumes=False, result=result)
    return result


def _measure(config: BenchConfig, variant: str, images: str, tick: Tick) -> SweepPoint:
    """One point: a fresh worker, a few steps, its peak."""
    point = SweepPoint(variant, config.net.depth)
    try:
        with Worker(make_job(config, variant, config.batch, images), config.timeout) as worker:
            peak = measure_peak(worker, config.memory_steps)
            point.held_mib, point.peak_mib, point.losses = (
                peak.held_mib,
                peak.peak_mib,
                peak.losses,
            )
    except WorkerError as error:
        point.error = str(error)
    tick(f"{variant}: depth {config.net.depth}")
    return point


def _compare_losses(points: list[SweepPoint], dtype: str) -> None:
    """Marks points of one depth whose losses differ from the reference's."""
    measured = [point for point in points if not point.error]
    reference = reference_row([Row(p.variant, losses=p.losses) for p in measured])
    for point in measured:
        assert reference is not None
        point.error = disagreement(point.losses, reference.losses, dtype)

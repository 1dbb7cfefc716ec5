# SPDX-License-Identifier: Apache-2.0
"""The benchmark: every variant in a process of its own, one step at a time in turns.

All workers stay alive while they are timed and only one computes at a time; the order rotates, so
that whatever else the machine does falls on all variants alike, and ratios are taken between steps
of the same round. Memory is measured apart, in fresh processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from fastdense._support import Interrupted
from fastdense.bench.environment import describe
from fastdense.bench.job import Job
from fastdense.bench.photographs import PhotoBatch, load_batch
from fastdense.bench.process import Worker, WorkerError
from fastdense.bench.results import (
    BenchConfig,
    BenchResult,
    Row,
    disagreement,
    reference_row,
    relative_difference,
)
from fastdense.bench.roofline import measure_ceilings

# Told, after each small part of the work, what was done.
Tick = Callable[[str], None]


def run_bench(config: BenchConfig, tick: Tick = lambda _: None) -> BenchResult:
    """Measures all variants of a configuration.

    Args:
        config: what to measure.
        tick: progress callback; called at most `count_ticks(config)` times.

    Returns:
        The samples; a variant that failed has the reason in its row.

    Raises:
        InputError: there are no usable images.
        Interrupted: Ctrl-C; ``result`` has the samples of the rounds that were timed completely.
    """
    most = max(config.batch, *config.memory_batches, 1)
    interrupted = False
    with stored_batch(config, most) as (path, photos):
        rows = [Row(variant) for variant in config.variants]
        try:
            for _ in range(config.repeats):
                time_rows([row for row in rows if not row.time_error], config, path, tick)
            for row in rows:
                if not row.time_error:
                    measure_memory(row, config, path, tick)
        except KeyboardInterrupt:
            if not any(row.seconds for row in rows):
                raise
            interrupted = True
    ceilings = measure_ceilings(getattr(torch, config.dtype)) if config.device == "cuda" else None
    result = BenchResult(config, describe(config.threads), photos.source, photos.skipped, rows, ceilings, interrupted)
    if interrupted:
        done = f"{max(len(row.seconds) for row in rows)} of {config.repeats * config.steps} rounds"
        raise Interrupted(f"stopped; {done} were timed. To measure all:", resumes=False, result=result)
    return result


def count_ticks(config: BenchConfig) -> int:
    """How often `run_bench` reports progress when nothing fails."""
    timed = config.repeats * (1 + config.warmup + config.steps)
    return len(config.variants) * (timed + len(config.memory_batches))


@contextlib.contextmanager
def stored_batch(config: BenchConfig, count: int) -> Iterator[tuple[str, PhotoBatch]]:
    """Writes the images to a temporary file, from which every worker reads the same ones."""
    photos = load_batch(config.images, count, config.size, config.seed)
    with tempfile.TemporaryDirectory(prefix="fastdense-bench-") as folder:
        path = Path(folder) / "images.npy"
        np.save(path, photos.images)
        yield str(path), photos


def make_job(config: BenchConfig, variant: str, batch: int, images: str) -> Job:
    """The job of one worker."""
    return Job(
        net=config.net,
        variant=variant,
        batch=batch,
        images=images,
        device=config.device,
        dtype=config.dtype,
        mode=config.mode,
        threads=config.threads,
        seed=config.seed,
        lr=config.lr,
        budget=config.budget,
        fault=config.faults.get(variant),
    )


class Fleet:
    """The workers of all rows that are still in the race; a context manager that ends them."""

    def __init__(self, rows: Sequence[Row], tick: Tick) -> None:
        self._rows = {row.variant: row for row in rows}
        self._workers: dict[str, Worker] = {}
        self._tick = tick
        self._round = 0

    def start(self, jobs: Sequence[Job], timeout: float) -> None:
        """Starts all workers, waits for them, and compares their initial weights."""
        for job in jobs:
            self._workers[job.variant] = Worker(job, timeout)
        digest = None
        for name in list(self._workers):
            with self._failing(name):
                ready = self._workers[name].wait_ready()
                self._rows[name].parameters = ready["parameters"]
                self._rows[name].threads = ready["threads"]
                digest = digest or ready["digest"]
                if ready["digest"] != digest:
                    self.drop(name, "initial weights differ from the first variant's")
            self._tick(f"{name}: started")

    def step_all(self, what: str) -> dict[str, dict[str, Any]]:
        """One step of every worker, each in its turn; the order rotates from call to call."""
        names = list(self._workers)
        start = self._round % max(len(names), 1)
        self._round += 1
        steps = {}
        for name in names[start:] + names[:start]:
            with self._failing(name):
                steps[name] = self._workers[name].step()
            self._tick(f"{name}: {what}")
        return steps

    def drop(self, variant: str, reason: str) -> None:
        """Takes a variant out of the race."""
        self._rows[variant].fail(reason)
        self._workers.pop(variant).close()

    def finish(self) -> None:
        """Ends all workers and notes their peak memory."""
        for name in list(self._workers):
            with self._failing(name):
                row = self._rows[name]
                row.peak_mib = max(row.peak_mib or 0.0, self._workers[name].finish())

    @contextlib.contextmanager
    def _failing(self, variant: str) -> Iterator[None]:
        try:
            yield
        except WorkerError as error:
            self.drop(variant, str(error))

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers.values():
            worker.close()


def time_rows(rows: Sequence[Row], config: BenchConfig, images: str, tick: Tick) -> None:
    """Starts workers for the rows, compares the losses of their first steps, then times them."""
    with Fleet(rows, tick) as fleet:
        jobs = [make_job(config, row.variant, config.batch, images) for row in rows]
        fleet.start(jobs, config.timeout)
        losses: dict[str, list[float]] = {row.variant: [] for row in rows}
        for _ in range(config.warmup):
            for name, step in fleet.step_all("comparing losses").items():
                losses[name].append(step["loss"])
        _compare_losses([row for row in rows if not row.time_error], losses, fleet, config.dtype)
        for _ in range(config.steps):
            steps = fleet.step_all("timing")
            for row in rows:
                if row.variant in steps and not row.time_error:
                    row.seconds.append(steps[row.variant]["seconds"])
        fleet.finish()


def _compare_losses(rows: Sequence[Row], losses: dict[str, list[float]], fleet: Fleet, dtype: str) -> None:
    """Drops every row whose losses differ from those of the reference."""
    reference = reference_row(rows)
    for row in rows:
        assert reference is not None
        mine, expected = losses[row.variant], losses[reference.variant]
        row.losses = row.losses or mine
        row.loss_difference = max(row.loss_difference or 0.0, *relative_difference(mine, expected))
        reason = disagreement(mine, expected, dtype)
        if reason:
            fleet.drop(row.variant, reason)


def measure_memory(row: Row, config: BenchConfig, images: str, tick: Tick) -> None:
    """Peak memory of a fresh process at each batch size."""
    with contextlib.ExitStack() as stack:
        workers = {
            batch: stack.enter_context(Worker(make_job(config, row.variant, batch, images), config.timeout))
            for batch in config.memory_batches
        }
        for batch, worker in workers.items():
            try:
                row.peaks[batch] = measure_peak(worker, config.memory_steps).peak_mib
            except WorkerError as error:
                row.memory_error = row.memory_error or f"memory at batch {batch}: {error}"
            tick(f"{row.variant}: memory at batch {batch}")


@dataclasses.dataclass(frozen=True)
class Peak:
    """Memory of one worker in MiB, before its first step and at most, and its losses."""

    held_mib: float
    peak_mib: float
    losses: list[float]


def measure_peak(worker: Worker, steps: int) -> Peak:
    """Runs a worker for some steps and ends it.

    Raises:
        WorkerError: it failed.
    """
    held = float(worker.wait_ready()["held_mib"])
    losses = [float(worker.step()["loss"]) for _ in range(steps)]
    return Peak(held, worker.finish(), losses)

# SPDX-License-Identifier: Apache-2.0
"""Measures super-resolution: ``python -m benchmarks.super_resolution_targets --json FILE``.

Plain concatenation in both memory formats against the shared buffer. Pictures and losses must agree before a figure is
believed. Times are taken in turns in one process, ratios are medians over rounds to the faster plain layout; peaks of
memory are those of processes of their own. ``--quick`` uses smaller nets and pictures, to see that the script works.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastdense
from fastdense._support import write_json
from fastdense.bench.environment import describe
from fastdense.bench.memory import mib_per_image, peak_resident_mib, resident_mib
from fastdense.models import SuperResolutionNet

VARIANTS = ("plain", "plain-channels-last", "fastdense")
_SIDE = 48  # of a training patch


def make(name: str, blocks: int, variant: str) -> SuperResolutionNet:
    torch.manual_seed(0)
    net: Any = fastdense.models.create(name, scale=4, blocks=blocks)
    if variant.startswith("plain"):
        fastdense.restore(net)
        net.recompute_tail = False
    return net.to(memory_format=torch.channels_last) if variant == "plain-channels-last" else net


def picture(variant: str, batch: int, side: int) -> Tensor:
    x = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
    return x.to(memory_format=torch.channels_last) if variant == "plain-channels-last" else x


def step(net: SuperResolutionNet, x: Tensor) -> Tensor:
    """One training step without the optimizer."""
    net.zero_grad(set_to_none=True)
    out = net(x)
    loss = F.l1_loss(out, torch.zeros_like(out))
    loss.backward()
    return loss.detach()


@torch.no_grad()
def infer(net: SuperResolutionNet, x: Tensor, variant: str) -> Tensor:
    return fastdense.upscale(net, x) if variant == "fastdense" else net(x)


def _peak(job: tuple[str, int, str, str, int, int, int]) -> tuple[float, float]:
    """Peak of a process above what it held before, MiB, and the loss or the mean of the picture."""
    name, blocks, variant, kind, batch, side, threads = job
    torch.set_num_threads(threads)
    net, x = make(name, blocks, variant), picture(variant, batch, side)
    before = resident_mib()
    value = step(net, x) if kind == "train" else infer(net.eval(), x, variant).mean()
    return peak_resident_mib() - before, float(value)


def peak(*job: Any) -> tuple[float, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (job,))


def check(name: str, expected: float, actual: float) -> None:
    """A wrong result is not reported."""
    if abs(actual - expected) > 1e-4 * max(1.0, abs(expected)):
        raise SystemExit(f"{name}: expected {expected}, got {actual}")


def training_memory(name: str, blocks: int, threads: int) -> dict[str, Any]:
    """MiB per image of a training step, as the slope between two batch sizes."""
    slopes, values = {}, {}
    for variant in VARIANTS:
        peaks = {batch: peak(name, blocks, variant, "train", batch, _SIDE, threads) for batch in (1, 3)}
        slopes[variant] = mib_per_image({batch: mib for batch, (mib, _) in peaks.items()})
        values[variant] = peaks[3][1]
        check(f"{name} {variant}", values["plain"], values[variant])
    plain = min(slopes["plain"], slopes["plain-channels-last"])
    return {
        "what": f"{name}, MiB per {_SIDE} x {_SIDE} patch in training",
        **slopes,
        "ratio": slopes["fastdense"] / plain,
    }


def inference_memory(name: str, blocks: int, side: int, threads: int) -> dict[str, Any]:
    """Peak above weights and input for a whole picture."""
    made = {variant: peak(name, blocks, variant, "infer", 1, side, threads) for variant in VARIANTS}
    for variant in VARIANTS:
        check(f"{name} {variant}", made["plain"][1], made[variant][1])
    peaks = {variant: mib for variant, (mib, _) in made.items()}
    plain = min(peaks["plain"], peaks["plain-channels-last"])
    return {"what": f"{name}, MiB for {side} x {side} to x4", **peaks, "ratio": peaks["fastdense"] / plain}


def times(name: str, blocks: int, kind: str, batch: int, side: int, rounds: int) -> dict[str, Any]:
    nets = {variant: make(name, blocks, variant).train(kind == "train") for variant in VARIANTS}
    pictures = {variant: picture(variant, batch, side) for variant in VARIANTS}
    run: dict[str, Callable[[], Tensor]] = {
        variant: (lambda v=variant: step(nets[v], pictures[v]))
        if kind == "train"
        else (lambda v=variant: infer(nets[v], pictures[v], v))
        for variant in VARIANTS
    }
    expected = run["plain"]()
    for variant in VARIANTS:  # warms up, too
        difference = (run[variant]() - expected).abs().max().item()
        if difference > 1e-4:
            raise SystemExit(f"{name} {variant}: results differ by {difference:.1e}")
    taken: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            start = time.perf_counter()
            run[variant]()
            taken[variant].append(1000 * (time.perf_counter() - start))
    medians = {variant: statistics.median(samples) for variant, samples in taken.items()}
    plain = min(VARIANTS[:2], key=lambda variant: medians[variant])
    ratios = [ours / theirs for ours, theirs in zip(taken["fastdense"], taken[plain], strict=True)]
    what = f"{name}, ms, {kind} {batch} x {side} x {side}"
    return {"what": what, **medians, "ratio": statistics.median(ratios), "samples": taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=512, help="of the picture whose peak is measured")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    blocks, side, small = (2, 64, 32) if options.quick else (23, options.side, 96)
    deep = 2 if options.quick else 16
    rows = [
        training_memory("rrdbnet", blocks, threads),
        training_memory("rdn", deep, threads),
        inference_memory("rrdbnet", blocks, side, threads),
        times("rrdbnet", blocks, "infer", 1, small, options.rounds),
        times("rrdbnet", blocks, "train", 1, _SIDE, options.rounds),
        times("rdn", deep, "infer", 1, small, options.rounds),
        times("rdn", deep, "train", 1, _SIDE, options.rounds),
    ]
    table = Table("what", *VARIANTS, "ratio")
    for row in rows:
        table.add_row(row["what"], *(f"{row[variant]:.1f}" for variant in VARIANTS), f"{row['ratio']:.2f}")
    Console().print(table)
    if options.json:
        write_json(options.json, {"environment": describe(), "blocks": [blocks, deep], "rows": rows})


if __name__ == "__main__":
    main()

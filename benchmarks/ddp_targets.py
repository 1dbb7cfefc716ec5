# SPDX-License-Identifier: Apache-2.0
"""Measures what DDP costs a converted DenseNet-121: ``python -m benchmarks.ddp_targets --json FILE``.

Two processes with one thread each, plain (channels_last, the faster layout) and converted, in turns: a training step of
the first process alone, and one of both by DistributedDataParallel. Losses must agree before a time is believed. The
cost of DDP is its time over that of the process alone; ratios are medians over rounds.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import torchvision
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastdense
from fastdense._support import write_json
from fastdense.bench.environment import describe

VARIANTS = ("plain", "fastdense")


def make(variant: str) -> nn.Module:
    torch.manual_seed(0)
    net = torchvision.models.densenet121(weights=None).to(memory_format=torch.channels_last)
    return fastdense.convert(net) if variant == "fastdense" else net


def step(net: nn.Module, x: torch.Tensor) -> float:
    """A training step without the optimizer; returns the loss."""
    net.zero_grad(set_to_none=True)
    loss = net(x).logsumexp(1).mean()
    loss.backward()
    return loss.item()


def measure(rank: int, store: str, batch: int, size: int, rounds: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(rank))
    x = x.to(memory_format=torch.channels_last)
    alone = {variant: make(variant) for variant in VARIANTS}
    together = {variant: DistributedDataParallel(make(variant)) for variant in VARIANTS}
    losses = {variant: (step(alone[variant], x), step(together[variant], x)) for variant in VARIANTS}  # warms up, too
    for variant in VARIANTS:
        for loss in losses[variant]:
            if abs(loss - losses["plain"][0]) > 1e-4 * abs(loss):
                raise SystemExit(f"{variant}: losses {losses} differ")
    taken: dict[str, list[float]] = {f"{variant}, {how}": [] for variant in VARIANTS for how in ("alone", "DDP")}
    for _ in range(rounds):
        for variant in VARIANTS:
            for how, net in (("alone", alone[variant]), ("DDP", together[variant])):
                dist.barrier()
                start = time.perf_counter()
                if how == "DDP" or rank == 0:
                    step(net, x)
                dist.barrier()
                taken[f"{variant}, {how}"].append(1000 * (time.perf_counter() - start))
    if rank == 0:
        results.put(taken)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4, help="pictures of a process")
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"{folder}/store", options.batch, options.size, options.rounds, results)
        torch.multiprocessing.spawn(measure, arguments, nprocs=2)
        taken = results.get()
    costs = {
        variant: [both / one for both, one in zip(taken[f"{variant}, DDP"], taken[f"{variant}, alone"], strict=True)]
        for variant in VARIANTS
    }
    medians = {name: statistics.median(samples) for name, samples in taken.items()}
    cost = {variant: statistics.median(ratios) for variant, ratios in costs.items()}
    relative = statistics.median(ours / plain for ours, plain in zip(costs["fastdense"], costs["plain"], strict=True))
    table = Table("DenseNet-121", "alone, ms", "DDP, ms", "cost of DDP")
    for variant in VARIANTS:
        table.add_row(
            variant, *(f"{medians[f'{variant}, {how}']:.0f}" for how in ("alone", "DDP")), f"{cost[variant]:.3f}"
        )
    Console().print(table, f"cost of DDP, fastdense to plain: {relative:.3f}")
    if options.json:
        report = {"environment": describe(), "batch": options.batch, "size": options.size, "samples": taken}
        write_json(options.json, {**report, "medians": medians, "cost": cost, "relative": relative})


if __name__ == "__main__":
    main()

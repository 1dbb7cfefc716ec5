# SPDX-License-Identifier: Apache-2.0
"""Trains small networks for a thousand steps in one process: ``python -m benchmarks.soak`` or ``make soak``.

Resident memory must not grow once it has warmed up: the slope of a line through its samples stays below a bound.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator

import timm.models.dpn as timm_dpn
import torch
import torchvision.models.densenet as tv_densenet
from torch import nn

import fastdense
from fastdense.bench.memory import resident_mib
from fastdense.models.sr.rrdbnet import RRDB

_MOST_KIB_PER_STEP = 1.0
_EVERY = 10  # steps between two samples


def densenet() -> nn.Module:
    net = tv_densenet.DenseNet(growth_rate=8, block_config=(2, 3), num_init_features=8, num_classes=5, drop_rate=0.1)
    return fastdense.convert(net)


def dpn() -> nn.Module:
    sizes = {"k_sec": (1, 2, 1, 1), "inc_sec": (4, 4, 4, 4), "k_r": 8, "groups": 2, "num_classes": 5}
    return fastdense.convert(timm_dpn.DPN(**sizes, small=True, num_init_features=8))


def rrdb() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), RRDB(16, 8), nn.Conv2d(16, 3, 3, padding=1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"DenseNet": densenet, "DPN": dpn, "RRDB": rrdb}


def training(name: str, side: int = 32) -> Iterator[None]:
    """Takes a training step each time it is asked for the next item."""
    torch.manual_seed(0)
    net = NETWORKS[name]()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    while True:
        optimizer.zero_grad()
        net(torch.rand(2, 3, side, side)).square().mean().backward()
        optimizer.step()
        yield


def resident_slope(name: str, steps: int) -> tuple[float, float]:
    """Growth of resident memory in KiB per step over the last three quarters of the steps, and its end in MiB."""
    samples = []
    for step, _ in zip(range(steps), training(name), strict=False):
        if step % _EVERY == 0 and step >= steps // 4:
            samples.append((float(step), 1024 * resident_mib()))
    line = statistics.linear_regression(*zip(*samples, strict=True))
    return line.slope, samples[-1][1] / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    worst = 0.0
    for name in NETWORKS:
        slope, end = resident_slope(name, steps)
        worst = max(worst, slope)
        print(f"{name:<10}{steps} steps: {slope:+.3f} KiB a step, {end:.0f} MiB at the end", flush=True)
    if worst > _MOST_KIB_PER_STEP:
        print(f"soak: expected at most {_MOST_KIB_PER_STEP} KiB a step, got {worst:.3f}")
    return int(worst > _MOST_KIB_PER_STEP)


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Measures super-resolution: ``python -m benchmarks.super_resolution_targets --json FILE``.

Plain concatenation in both memory formats against the shared buffer. Pictures and losses must agree before a figure is
believed. Times are taken in turns in one process, ratios are medians over rounds to the faster plain layout; peaks of
memory are those of processes of their own. ``--quick`` uses smaller nets and pictures, to see that the script works.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdense
from benchmarks.turns import Row, check_equal, in_own_process, parser_of, report, row_of_times, row_of_values
from fastdense.bench.memory import mib_per_image, peak_above
from fastdense.models import SuperResolutionNet

VARIANTS = ("plain", "plain-channels-last", "fastdense")
RECOMPUTED = (*VARIANTS, "fastdense-recomputed-tail")  # of networks that keep the tail unless told otherwise
_SIDE = 48  # of a training patch


def make(name: str, blocks: int, variant: str) -> SuperResolutionNet:
    torch.manual_seed(0)
    scale = {} if name == "srdensenet" else {"scale": 4}  # which knows no other
    net: Any = fastdense.models.create(name, blocks=blocks, **scale)
    if variant.startswith("plain"):
        fastdense.restore(net)
        net.recompute_tail = False
    if variant.endswith("recomputed-tail"):
        net.recompute_tail = True
    return net.to(memory_format=torch.channels_last) if variant == "plain-channels-last" else net


def picture(net: SuperResolutionNet, variant: str, batch: int, side: int) -> Tensor:
    x = torch.rand(batch, net.colours, side, side, generator=torch.Generator().manual_seed(1))
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


def _peak(name: str, blocks: int, variant: str, kind: str, batch: int, side: int, threads: int) -> tuple[float, float]:
    """Peak of a process above what it held before, MiB, and the loss or the mean of the picture."""
    torch.set_num_threads(threads)
    net = make(name, blocks, variant).train(kind == "train")
    run = (lambda x: step(net, x)) if kind == "train" else (lambda x: infer(net, x, variant).mean())
    run(picture(net, variant, 1, 16))
    net.zero_grad(set_to_none=True)
    x = picture(net, variant, batch, side)
    return peak_above(lambda: float(run(x)))


def training_memory(name: str, blocks: int, threads: int, variants: tuple[str, ...] = VARIANTS) -> Row:
    """MiB per image of a training step, as the slope between two batch sizes."""
    slopes, losses = {}, {}
    for variant in variants:
        peaks = {}
        for batch in (1, 3):
            peaks[batch], losses[variant] = in_own_process(_peak, name, blocks, variant, "train", batch, _SIDE, threads)
        slopes[variant] = mib_per_image(peaks)
        check_equal(f"{name} {variant}", losses["plain"], losses[variant])
    return row_of_values(f"{name}, MiB per {_SIDE} x {_SIDE} patch in training", slopes)


def inference_memory(name: str, blocks: int, side: int, threads: int) -> Row:
    """Peak above weights and input for a whole picture."""
    peaks, means = {}, {}
    for variant in VARIANTS:
        peaks[variant], means[variant] = in_own_process(_peak, name, blocks, variant, "infer", 1, side, threads)
        check_equal(f"{name} {variant}", means["plain"], means[variant])
    return row_of_values(f"{name}, MiB for {side} x {side} to x4", peaks)


def times(
    name: str, blocks: int, kind: str, batch: int, side: int, rounds: int, variants: tuple[str, ...] = VARIANTS
) -> Row:
    nets = {variant: make(name, blocks, variant).train(kind == "train") for variant in variants}
    pictures = {variant: picture(nets[variant], variant, batch, side) for variant in variants}
    runs: dict[str, Callable[[], Tensor]] = {
        variant: (lambda v=variant: step(nets[v], pictures[v]))
        if kind == "train"
        else (lambda v=variant: infer(nets[v], pictures[v], v))
        for variant in variants
    }
    expected = runs["plain"]()
    for variant in variants:
        difference = (runs[variant]() - expected).abs().max().item()
        if not difference <= 1e-4:  # a NaN differs
            raise SystemExit(f"{name} {variant}: results differ by {difference:.1e}")
    return row_of_times(f"{name}, ms, {kind} {batch} x {side} x {side}", runs, rounds)


def main() -> None:
    parser = parser_of(__doc__, 5)
    parser.add_argument("--side", type=int, default=512, help="of the picture whose peak is measured")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    blocks, side, small = (2, 64, 32) if options.quick else (23, options.side, 96)
    deep, wide = (2, 2) if options.quick else (16, 8)
    rows = [
        training_memory("rrdbnet", blocks, threads),
        training_memory("rdn", deep, threads),
        training_memory("srdensenet", wide, threads, RECOMPUTED),
        inference_memory("rrdbnet", blocks, side, threads),
        times("rrdbnet", blocks, "infer", 1, small, options.rounds),
        times("rrdbnet", blocks, "train", 1, _SIDE, options.rounds),
        times("rdn", deep, "infer", 1, small, options.rounds),
        times("rdn", deep, "train", 1, _SIDE, options.rounds),
        times("srdensenet", wide, "train", 1, _SIDE, options.rounds, RECOMPUTED),
    ]
    report(rows, options.json, blocks=[blocks, deep, wide])


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Times the kernels of one dense layer on a GPU: ``python -m benchmarks.cuda_kernels [--batch 256] [--json FILE]``.

For layers of DenseNet-121 and of two CIFAR DenseNets, in bfloat16, one table a shape: each fused kernel's time, what it
moves and computes in a second, and the least time at the rates of a large copy and a large product over its own; then
the time of all kernels of the layer, forward and backward, fused and by the library's products and convolutions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import fastdense
from fastdense import _C
from fastdense._support import write_json
from fastdense.bench.environment import describe
from fastdense.bench.roofline import Ceilings, measure_ceilings, raise_clocks, tensor_core_kernels

# Side of an image, channels of the prefix, growth rate: narrow and wide layers of every block.
LAYERS = [(56, 64, 32), (56, 224, 32), (28, 128, 32), (28, 480, 32), (14, 256, 32), (14, 992, 32), (7, 512, 32)]
LAYERS += [(7, 992, 32), (32, 24, 12), (32, 600, 40)]
STEPS = 20
OVERHEAD = "Activity Buffer Request"  # what the profiler itself takes


@dataclass
class Kernel:
    """A kernel's time in a layer."""

    name: str
    microseconds: float
    gb_per_second: float | None = None
    tflop_per_second: float | None = None
    floor_share: float | None = None


@dataclass
class Layer:
    """What was found of a shape; the times of all kernels by choice."""

    side: int
    channels: int
    growth_rate: int
    kernels: list[Kernel]
    microseconds: dict[str, float]


def rate(times: Iterable[tuple[str, float]], pixels: int, c: int, k: int, ceilings: Ceilings) -> list[Kernel]:
    """Names and microseconds of launched kernels; of those of the model, what they reach.

    A kernel that a layer launches several times, such as column reductions, counts once with the sum of its times.
    """
    model = tensor_core_kernels(c, 4 * k, k)
    found = []
    for name, microseconds in times:
        part = next((part for part in model if part in name), None)
        if part is None:
            found.append(Kernel(name[:100], microseconds))
            continue
        elements, flops = model[part]
        moved, computed, seconds = 2.0 * pixels * elements, float(pixels * flops), microseconds / 1e6
        least = max(moved / ceilings.bytes_per_second, computed / ceilings.flops_per_second)
        found.append(Kernel(part, microseconds, moved / seconds / 1e9, computed / seconds / 1e12, least / seconds))
    return found


def device_times(step: Callable[[], object], steps: int) -> list[tuple[str, float, float]]:
    """Names of the kernels of a step, launches and microseconds; the slowest first, means of so many steps."""
    raise_clocks(step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    found = [
        (event.key, event.count / steps, event.self_device_time_total / steps)
        for event in profile.key_averages()
        if event.self_device_time_total > 0 and event.key != OVERHEAD
    ]
    return sorted(found, key=lambda item: -item[2])


def time_layer(side: int, c: int, k: int, batch: int) -> list[tuple[str, float]]:
    """Names and microseconds of the kernels of a layer's forward and backward pass, slowest first."""
    block = fastdense.nn.DenseBlock(num_layers=1, in_channels=c, growth_rate=k).cuda()
    x = torch.randn(batch, c, side, side, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()

    def step() -> None:
        block.zero_grad(set_to_none=True)  # nothing is added to gradients of the step before
        x.grad = None
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = block(x)
        out.backward(out.detach())

    return [(name, microseconds) for name, _, microseconds in device_times(step, STEPS)]


def measured(batch: int, ceilings: Ceilings, choices: tuple[str, ...]) -> Iterator[Layer]:
    choice = _C.build_info()["cuda_kernels"]
    try:
        for side, c, k in LAYERS:
            times = {}
            for kernels in choices:
                _C.set_cuda_kernels(kernels)
                times[kernels] = time_layer(side, c, k, batch)
            rated = rate(times[choices[0]], batch * side * side, c, k, ceilings)
            yield Layer(side, c, k, rated, {name: sum(t for _, t in found) for name, found in times.items()})
    finally:
        _C.set_cuda_kernels(choice)


def choices_here() -> tuple[str, ...]:
    """The ways to run a layer, the fused kernels first; not these where the environment chose the library's."""
    return ("library",) if _C.build_info()["cuda_kernels"] == "library" else ("fused", "library")


def table(layer: Layer) -> str:
    """A Markdown table of a layer's kernels."""

    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    lines = [f"side {layer.side}, {layer.channels} channels, growth rate {layer.growth_rate}"]
    lines += ["", "| kernel | us | GB/s | TFLOP/s | of floor |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {kernel.name} | {cell(kernel.microseconds, 1)} | {cell(kernel.gb_per_second, 0)} "
        f"| {cell(kernel.tflop_per_second, 1)} | {cell(kernel.floor_share, 2)} |"
        for kernel in layer.kernels
    ]
    said = {"fused": "fused", "library": "by the library"}
    times = ", ".join(f"{time:.0f} us {said[name]}" for name, time in layer.microseconds.items())
    return "\n".join([*lines, "", f"all kernels: {times}", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA GPU to time kernels on, got none")
    ceilings = measure_ceilings(torch.bfloat16)
    results = {"environment": describe(), "batch": options.batch, "ceilings": asdict(ceilings)}
    layers: list[Layer] = []
    for layer in measured(options.batch, ceilings, choices_here()):
        layers.append(layer)
        print(table(layer), flush=True)
        if options.json:  # again and again: whoever ends this early has what is there
            write_json(options.json, results | {"layers": [asdict(each) for each in layers]})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""Measures what docs/measured.md says of bicubic resampling: ``python -m benchmarks.bicubic_targets --json FILE``.

Every result is compared with its rival's before a time is believed; rivals, fastdense and a copy of the same bytes take
turns in one process, ratios are medians over rounds. Forward and backward are torch's own kernels without autograd.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from fastdense import bicubic_resize
from fastdense._support import write_json
from fastdense.bench.environment import describe
from fastdense.ops.bicubic import PRESETS

SHAPES = [  # input, size of the result, antialias
    ((1, 3, 1024, 1024), (4096, 4096), False),
    ((16, 3, 128, 128), (512, 512), False),
    ((16, 3, 512, 512), (128, 128), True),
    ((8, 64, 128, 128), (256, 256), False),
    ((1, 3, 320, 320), (512, 512), False),
]
BYTE_SIZES = [((512, 512), (1024, 1024)), ((1024, 1024), (512, 512))]

Runs = dict[str, Callable[[], Any]]


def measure(runs: Runs, rounds: int) -> dict[str, float]:
    """Median milliseconds of each, taking turns."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if index >= 2:
                samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def copy_of(count: int) -> Callable[[], Any]:
    """A copy that reads and writes so many bytes in all, as an operator with a fresh result does."""
    source = torch.empty(count // 2, dtype=torch.uint8).fill_(1)
    return lambda: source.clone()


def float_runs(shape, size, antialias: bool, layout: torch.memory_format) -> dict[str, Runs]:
    x = torch.rand(shape).to(memory_format=layout)
    grad = torch.rand(*shape[:2], *size).to(memory_format=layout)
    preset = PRESETS["torch_antialias" if antialias else "torch"]
    options = [n / m for n, m in zip(shape[2:], size, strict=True)], preset.a, preset.antialias, preset.border, False
    aten = torch.ops.aten
    backward = aten._upsample_bicubic2d_aa_backward if antialias else aten.upsample_bicubic2d_backward
    forward = {
        "torch": lambda: F.interpolate(x, size, mode="bicubic", antialias=antialias),
        "fastdense": lambda: bicubic_resize(x, size, preset="torch_antialias" if antialias else "torch"),
    }
    gradient = {
        "torch": lambda: backward(grad, size, list(shape), False, None, None),
        "fastdense": lambda: torch.ops.fastdense._bicubic_backward(grad, shape[2:], *options),
    }
    for runs in (forward, gradient):
        # torch rounds its coordinates to float32, hence the tolerance.
        torch.testing.assert_close(runs["fastdense"](), runs["torch"](), rtol=2e-3, atol=2e-3)
        runs["copy"] = copy_of(4 * (x.numel() + grad.numel()))
    return {"forward": forward, "backward": gradient}


def byte_runs(old, new, preset: str) -> Runs:
    image = numpy.random.default_rng(0).integers(0, 256, (*old, 3), dtype=numpy.uint8)
    batch = torch.from_numpy(image).movedim(-1, 0)[None]
    picture = Image.fromarray(image)
    runs: Runs = {"fastdense": lambda: bicubic_resize(batch, new, preset=preset)}
    if preset == "pillow":
        runs["Pillow"] = lambda: numpy.asarray(picture.resize(new[::-1], Image.Resampling.BICUBIC))
    else:
        runs["OpenCV"] = lambda: cv2.resize(image, new[::-1], interpolation=cv2.INTER_CUBIC)
    rival = runs["Pillow" if preset == "pillow" else "OpenCV"]()
    different = runs["fastdense"]()[0].movedim(0, -1).numpy() != rival
    assert different.mean() <= (0 if preset == "pillow" else 1e-3), f"{preset} differs"
    runs["copy"] = copy_of(3 * (old[0] * old[1] + new[0] * new[1]))
    return runs


def rows(rounds: int) -> list[dict[str, Any]]:
    """One a shape, layout and direction."""
    jobs: list[tuple[str, Callable[[], dict[str, Runs]]]] = []
    for shape, size, antialias in SHAPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            name = f"{'x'.join(map(str, shape))} to {size[0]}x{size[1]}{', antialias' if antialias else ''}"
            name += ", channels_last" if layout == torch.channels_last else ""
            jobs.append((name, lambda s=shape, z=size, a=antialias, m=layout: float_runs(s, z, a, m)))
    for old, new in BYTE_SIZES:
        for preset in ("pillow", "opencv"):
            name = f"uint8 {old[0]}x{old[1]}x3 to {new[0]}x{new[1]}, {preset}"
            jobs.append((name, lambda o=old, n=new, p=preset: {"forward": byte_runs(o, n, p)}))
    made = []
    for name, job in tqdm(jobs, desc="bicubic", leave=False):
        for direction, runs in job().items():
            made.append({"case": name, "direction": direction, "ms": measure(runs, rounds)})
    return made


def show(made: list[dict[str, Any]]) -> None:
    table = Table("case", "direction", "rival ms", "fastdense ms", "faster by", "of a copy")
    for row in made:
        ms = row["ms"]
        rival = next(name for name in ms if name not in ("fastdense", "copy"))
        cells = [f"{ms[rival]:.2f} {rival}", f"{ms['fastdense']:.2f}", f"{ms[rival] / ms['fastdense']:.1f}x"]
        table.add_row(row["case"], row["direction"], *cells, f"{ms['fastdense'] / ms['copy']:.1f}")
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and the environment")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    options = parser.parse_args()
    cv2.setNumThreads(torch.get_num_threads())
    made = rows(options.rounds)
    show(made)
    if options.json:
        write_json(options.json, {"kind": "bicubic", "environment": describe(), "rows": made})


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""``fastdense resize``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy
import torch

from fastdense._support import InputError, check_output
from fastdense.cli.bench import progress
from fastdense.ops.bicubic import bicubic_resize
from fastdense.sr.images import CorruptImageError, check_suffix, image_pairs, read_samples, write_samples

Change = Callable[[numpy.ndarray], numpy.ndarray]


def run(options: argparse.Namespace) -> int:
    """Resizes one picture or all pictures of a folder."""
    if (options.scale is None) == (options.size is None):
        raise InputError("resize: expected either --scale or --size to be given")
    size = (options.size[1], options.size[0]) if options.size else None

    def change(samples: numpy.ndarray) -> numpy.ndarray:
        return resize_samples(samples, size, options.scale, options.preset, options.antialias)

    return change_images("resize", options.input, options.output, change)


def change_images(command: str, source: Path, target: Path, change: Change) -> int:
    """Reads, changes and writes one picture or all pictures of a folder; what the command then returns."""
    jobs = image_pairs(command, source, target)
    failed = []
    with progress(command, len(jobs)) as tick:
        for read, write in jobs:
            check_suffix(command, write)
            check_output(f"{command}: expected OUT", write)
            try:
                samples = read_samples(read)
            except CorruptImageError as error:
                if source.is_file():
                    raise InputError(f"{command}: expected IN to be a picture, got {error}") from error
                failed.append(str(error))
            else:
                try:
                    write_samples(command, write, change(samples))
                except ValueError as error:
                    raise InputError(f"{command}: {read}: {error}") from error
            tick(read.name)
    for line in failed:
        print(f"skipped {line}")
    print(f"{command}d {len(jobs) - len(failed)} of {len(jobs)} pictures into {target}")
    return 1 if failed else 0


def resize_samples(
    samples: numpy.ndarray,
    size: tuple[int, int] | None,
    scale: float | None,
    preset: str,
    antialias: bool | None = None,
) -> numpy.ndarray:
    """``[H, W]`` or ``[H, W, C]`` of uint8, uint16 or float32; alpha and 16 bits a sample are kept."""
    batch = torch.from_numpy(samples.astype(numpy.float64) if samples.dtype == numpy.uint16 else samples.copy())
    batch = (batch if batch.dim() == 3 else batch[..., None]).movedim(-1, 0)[None]
    out = bicubic_resize(batch, size, scale, preset=preset, antialias=antialias)
    if samples.dtype == numpy.uint16:
        out = (out.clamp(0, 65535) + 0.5).floor().to(torch.int32)
    image = out[0].movedim(0, -1).contiguous().numpy().astype(samples.dtype)
    return image if samples.ndim == 3 else image[..., 0]

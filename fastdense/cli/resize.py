# SPDX-License-Identifier: Apache-2.0
"""``fastdense resize``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy

from fastdense._support import InputError, check_output
from fastdense.cli.bench import progress
from fastdense.sr.images import CorruptImageError, check_suffix, image_pairs, read_samples, write_samples
from fastdense.sr.resize_samples import resize_samples

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

# SPDX-License-Identifier: Apache-2.0
"""``fastdense resize``."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy
import torch

from fastdense._pictures import SUFFIXES, CorruptPictureError, find_pictures, open_picture
from fastdense._support import InputError, extra, write_atomically
from fastdense.cli.bench import progress
from fastdense.ops.bicubic import bicubic_resize

_KEPT_MODES = ("L", "LA", "RGB", "RGBA", "I;16", "F")


def run(options: argparse.Namespace) -> int:
    """Resizes one picture or all pictures of a folder."""
    if (options.scale is None) == (options.size is None):
        raise InputError("resize: expected either --scale or --size to be given")
    jobs = pairs(options.input, options.output)
    failed = []
    with progress("resize", len(jobs)) as tick:
        for source, target in jobs:
            try:
                resize_file(source, target, options)
            except CorruptPictureError as error:
                if options.input.is_file():
                    raise InputError(f"resize: expected IN to be a picture, got {error}") from error
                failed.append(str(error))
            tick(source.name)
    for line in failed:
        print(f"skipped {line}")
    print(f"resized {len(jobs) - len(failed)} of {len(jobs)} pictures into {options.output}")
    return 1 if failed else 0


def pairs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Which picture goes where: one file, or every picture below a folder."""
    if source.is_file():
        return [(source, target / source.name if target.is_dir() else target)]
    if not source.is_dir():
        raise InputError(f"resize: expected IN to be a picture or a folder, got {source}")
    if target.is_file():
        raise InputError(f"resize: expected OUT to be a folder like IN, got the file {target}")
    found = find_pictures(source)
    if not found:
        raise InputError(f"resize: expected IN to hold pictures ({', '.join(sorted(SUFFIXES))}), got none in {source}")
    return [(path, target / path.relative_to(source)) for path in found]


def resize_file(source: Path, target: Path, options: argparse.Namespace) -> None:
    """Resizes one picture; alpha and 16 bits a sample are kept, a file is written whole or not at all."""
    with extra("cli"):
        from PIL import Image
    if target.suffix.lower() not in SUFFIXES:
        raise InputError(f"resize: expected OUT to end in {', '.join(sorted(SUFFIXES))}, got {target}")
    picture = open_picture(source)
    if picture.mode not in _KEPT_MODES:
        transparent = "transparency" in picture.info or picture.mode == "PA"
        picture = picture.convert("RGBA" if transparent else "RGB")
    try:
        samples = resize_samples(numpy.asarray(picture), options)
    except ValueError as error:
        raise InputError(f"resize: {source}: {error}") from error
    out = Image.fromarray(samples)
    buffer = io.BytesIO()
    out.save(buffer, format=Image.registered_extensions()[target.suffix.lower()])
    write_atomically(target, lambda file: file.write(buffer.getvalue()))


def resize_samples(samples: numpy.ndarray, options: argparse.Namespace) -> numpy.ndarray:
    """``[H, W]`` or ``[H, W, C]`` of uint8, uint16 or float32."""
    batch = torch.from_numpy(samples.astype(numpy.float64) if samples.dtype == numpy.uint16 else samples.copy())
    batch = (batch if batch.dim() == 3 else batch[..., None]).movedim(-1, 0)[None]
    size = (options.size[1], options.size[0]) if options.size else None
    out = bicubic_resize(batch, size, options.scale, preset=options.preset, antialias=options.antialias)
    if samples.dtype == numpy.uint16:
        out = (out.clamp(0, 65535) + 0.5).floor().to(torch.int32)
    image = out[0].movedim(0, -1).contiguous().numpy().astype(samples.dtype)
    return image if samples.ndim == 3 else image[..., 0]

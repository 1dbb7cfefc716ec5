# SPDX-License-Identifier: Apache-2.0
"""``fastdense evaluate``."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy
import torch

from fastdense._support import InputError, check_output, extra, write_json
from fastdense.bench.photographs import scikit_image_folder
from fastdense.cli.bench import console, progress
from fastdense.cli.upscale import load_net
from fastdense.sr.images import CorruptImageError, check_suffix, find_images, open_image, write_samples
from fastdense.sr.quality import Quality, evaluate_image, luminance

PHOTOGRAPHS = "photographs"
# Those of scikit-image with which the protocol's baseline is documented.
PHOTOGRAPH_FILES = ("astronaut.png", "coffee.png", "chelsea.png", "camera.png", "motorcycle_left.png")


def run(options: argparse.Namespace) -> int:
    """Prints a table of PSNR and SSIM, and writes pictures side by side."""
    if options.threads:
        torch.set_num_threads(options.threads)
    net = load_net("evaluate", options.model) if options.model else None
    scale = options.scale or (net.scale if net is not None else 2)
    if options.json:
        check_output("evaluate: expected --json", options.json, (".json",))
    if options.picture:
        check_suffix("evaluate", options.picture)
        check_output("evaluate: expected --picture", options.picture)
    rows: dict[str, Quality] = {}
    paths, skipped = _paths(options.data), []
    with progress("evaluate", len(paths)) as tick:
        for path in paths:
            try:
                picture = _read(path)
                quality, bicubic, made = evaluate_image(picture, scale, net)
            except (CorruptImageError, ValueError) as error:
                if isinstance(error, ValueError) and net is not None and net.scale != scale:
                    raise InputError(str(error)) from error
                skipped.append(f"{path.name}: {error}")
            else:
                if options.picture and not rows:
                    write_samples("evaluate", options.picture, _side_by_side(picture, bicubic, made))
                rows[path.name] = quality
            tick(path.name)
    if not rows:
        raise InputError(f"evaluate: expected --data to hold pictures that can be used, got {'; '.join(skipped)}")
    _print(rows, scale)
    for line in skipped:
        print(f"skipped {line}")
    if options.json:
        pictures: Any = {name: quality._asdict() for name, quality in rows.items()}
        write_json(options.json, {"scale": scale, "model": options.model, "pictures": pictures, "skipped": skipped})
    return 1 if skipped else 0


def _paths(data: str) -> list[Path]:
    if data == PHOTOGRAPHS:
        return [scikit_image_folder("evaluate") / name for name in PHOTOGRAPH_FILES]
    folder = Path(data)
    if not folder.is_dir():
        raise InputError(f"evaluate: expected --data to be {PHOTOGRAPHS!r} or a folder, got {data}")
    found = find_images(folder)
    if not found:
        raise InputError(f"evaluate: expected --data to hold pictures, got none in {data}")
    return found


def _read(path: Path) -> numpy.ndarray:
    picture = open_image(path)
    return numpy.asarray(picture if picture.mode == "L" else picture.convert("RGB"))


def _side_by_side(picture: numpy.ndarray, *enlarged: torch.Tensor) -> numpy.ndarray:
    """Luminance of the enlarged pictures and the original, left to right."""
    height, width = enlarged[0].shape[2:]
    original = luminance(picture)[0, 0, :height, :width]
    return torch.cat([*(y[0, 0] for y in enlarged), original], 1).numpy().astype(numpy.uint8)


def _print(rows: dict[str, Quality], scale: int) -> None:
    with extra("cli"):
        from rich import box
        from rich.table import Table
    with_net = next(iter(rows.values())).psnr is not None
    headings = ["bicubic dB", "SSIM", *(["model dB", "SSIM", "gain dB"] if with_net else [])]
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column(f"picture, x{scale}", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    columns: Any = zip(*rows.values(), strict=True)
    means: Any = [None if None in column else statistics.mean(column) for column in columns]
    for name, quality in {**rows, "mean": Quality(*means)}.items():
        cells = [f"{quality.bicubic_psnr:.3f}", f"{quality.bicubic_ssim:.4f}"]
        if quality.psnr is not None:
            cells += [f"{quality.psnr:.3f}", f"{quality.ssim:.4f}", f"{quality.psnr - quality.bicubic_psnr:+.3f}"]
        table.add_row(name, *cells)
    console().print(table)
    console().print(f"Luminance, {scale} pixels shaved at each border, small pictures by MATLAB's bicubic.")

# SPDX-License-Identifier: Apache-2.0
"""``fastdense evaluate``."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdense._support import InputError, Interrupted, check_output, extra, write_json
from fastdense.cli.arguments import Commands, add_command, add_threads
from fastdense.cli.terminal import console, progress

if TYPE_CHECKING:
    from fastdense.sr.quality import Quality

PHOTOGRAPHS = "photographs"
# Those of scikit-image with which the protocol's baseline is documented.
PHOTOGRAPH_FILES = ("astronaut.png", "coffee.png", "chelsea.png", "camera.png", "motorcycle_left.png")

HELP = """Measure how good enlarged pictures are.

Shrinks pictures by MATLAB's bicubic, enlarges them again, and compares the luminance with the original: PSNR and SSIM
of bicubic enlargement and of a model. As many pixels as the scale are left out at each border. GAN-trained models are
not made for this comparison.

examples:
  fastdense evaluate --scale 2                            bicubic on the photographs of scikit-image
  fastdense evaluate --model runs/sr/model.pt --data Set5/ --picture side.png

Exit code 1 if a picture could not be used. Ctrl-C shows and writes what was measured so far.
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "evaluate", HELP, run)
    parser.add_argument("--model", metavar="MODEL", help="as for fastdense upscale (default: bicubic alone)")
    parser.add_argument(
        "--data", default=PHOTOGRAPHS, metavar="DIR", help="a folder (default: photographs of scikit-image)"
    )
    parser.add_argument("--scale", type=int, choices=range(2, 9), metavar="S", help="default: the model's, or 2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the first: bicubic, model, original")
    add_threads(parser)


def run(options: argparse.Namespace) -> int:
    """Prints a table of PSNR and SSIM, and writes pictures side by side."""
    from fastdense.cli.images import load_net, read_picture, side_by_side, use_threads
    from fastdense.sr.images import CorruptImageError, check_suffix, write_samples
    from fastdense.sr.quality import evaluate_image

    use_threads(options.threads)
    net = load_net("evaluate", options.model) if options.model else None
    scale = options.scale or (net.scale if net is not None else 2)
    if options.json:
        check_output("evaluate: expected --json", options.json, (".json",))
    if options.picture:
        check_suffix("evaluate", options.picture)
        check_output("evaluate: expected --picture", options.picture)
    rows: dict[str, Quality] = {}
    paths, skipped, stop = _paths(options.data), [], None
    with progress("evaluate", len(paths)) as tick:
        try:
            for path in paths:
                try:
                    picture = read_picture(path)
                    quality, bicubic, made = evaluate_image(picture, scale, net)
                except (CorruptImageError, ValueError) as error:
                    if isinstance(error, ValueError) and net is not None and net.scale != scale:
                        raise InputError(str(error)) from error
                    skipped.append(f"{path.name}: {error}")
                else:
                    if options.picture and not rows:
                        write_samples("evaluate", options.picture, side_by_side(picture, bicubic, made))
                    rows[path.name] = quality
                tick(path.name)
        except KeyboardInterrupt:
            if not rows:
                raise
            done = f"{len(rows)} of {len(paths)} pictures"
            stop = Interrupted(f"stopped; {done} were measured. To measure all:", resumes=False)
    if not rows:
        raise InputError(f"evaluate: expected --data to hold pictures that can be used, got {'; '.join(skipped)}")
    _print(rows, scale)
    for line in skipped:
        print(f"skipped {line}")
    if options.json:
        pictures: Any = {name: quality._asdict() for name, quality in rows.items()}
        numbers = {"scale": scale, "model": options.model, "pictures": pictures, "skipped": skipped}
        write_json(options.json, {**numbers, "interrupted": stop is not None})
    if stop:
        raise stop
    return 1 if skipped else 0


def _paths(data: str) -> list[Path]:
    from fastdense.bench.photographs import scikit_image_folder
    from fastdense.sr.images import find_images

    if data == PHOTOGRAPHS:
        return [scikit_image_folder("evaluate") / name for name in PHOTOGRAPH_FILES]
    folder = Path(data)
    if not folder.is_dir():
        raise InputError(f"evaluate: expected --data to be {PHOTOGRAPHS!r} or a folder, got {data}")
    found = find_images(folder)
    if not found:
        raise InputError(f"evaluate: expected --data to hold pictures, got none in {data}")
    return found


def _print(rows: dict[str, Quality], scale: int) -> None:
    with extra("cli"):
        from rich import box
        from rich.table import Table
    columns: Any = zip(*rows.values(), strict=True)
    means: Any = [None if None in column else statistics.mean(column) for column in columns]
    first = next(iter(rows.values()))
    headings = ["bicubic dB", "SSIM", *(["model dB", "SSIM", "gain dB"] if first.psnr is not None else [])]
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column(f"picture, x{scale}", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, quality in {**rows, "mean": type(first)(*means)}.items():
        cells = [f"{quality.bicubic_psnr:.3f}", f"{quality.bicubic_ssim:.4f}"]
        if quality.psnr is not None:
            cells += [f"{quality.psnr:.3f}", f"{quality.ssim:.4f}", f"{quality.psnr - quality.bicubic_psnr:+.3f}"]
        table.add_row(name, *cells)
    console().print(table)
    console().print(f"Luminance, {scale} pixels shaved at each border, small pictures by MATLAB's bicubic.")

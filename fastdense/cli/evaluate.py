# SPDX-License-Identifier: Apache-2.0
"""``fastdense evaluate``."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdense._support import InputError, Interrupted, check_output, extra, first_of, write_json
from fastdense.cli.arguments import Commands, add_command, add_threads, add_weights
from fastdense.cli.terminal import console, progress

if TYPE_CHECKING:
    from fastdense.models import SuperResolutionNet
    from fastdense.sr.quality import Compared, Quality

PHOTOGRAPHS = "photographs"
# Those of scikit-image with which the protocol's baseline is documented.
PHOTOGRAPH_FILES = ("astronaut.png", "coffee.png", "chelsea.png", "camera.png", "motorcycle_left.png")

HELP = """Measure how good enlarged pictures are.

Shrinks pictures by MATLAB's bicubic, enlarges them again, and compares the luminance with the original: PSNR and SSIM
of bicubic enlargement and of a model. As many pixels as the scale are left out at each border. GAN-trained models are
not made for this comparison. Pictures count with 8 bits; those with transparent pixels or several frames are left out.

examples:
  fastdense evaluate --scale 2                            bicubic on the photographs of scikit-image
  fastdense evaluate --model runs/sr/model.pt --data Set5/ --picture side.png
  fastdense evaluate --data results/ --reference Set5/ --scale 4      results of any program against the truth

Exit code 1 if a picture could not be used. Ctrl-C shows and writes what was measured so far.
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "evaluate", HELP, run)
    parser.add_argument("--model", metavar="MODEL", help="as for fastdense upscale (default: bicubic alone)")
    parser.add_argument(
        "--data", default=PHOTOGRAPHS, metavar="DIR", help="a folder (default: photographs of scikit-image)"
    )
    parser.add_argument(
        "--reference", type=Path, metavar="DIR", help="compare the pictures of --data with these, by relative path"
    )
    parser.add_argument("--scale", type=int, choices=range(2, 9), metavar="S", help="default: the model's, or 2")
    add_weights(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the first: bicubic, model, original")
    add_threads(parser)


def run(options: argparse.Namespace) -> int:
    """Prints a table of PSNR and SSIM, and writes pictures side by side."""
    from fastdense.cli.images import load_net, side_by_side, use_threads
    from fastdense.sr.images import Picture, find_format, write_picture

    use_threads(options.threads)
    if options.reference and options.model:
        raise InputError("evaluate: expected --model or --reference, got both")
    weights = {"scale": options.scale, "rgb_range": options.rgb_range, "residual_scale": options.res_scale}
    net = load_net("evaluate", options.model, **weights) if options.model else None
    scale = options.scale or (net.scale if net is not None else 2)
    if options.json:
        check_output("evaluate: expected --json", options.json, (".json",))
    if options.picture:
        find_format("evaluate", options.picture)
        check_output("evaluate: expected --picture", options.picture)
    pictures, skipped, left_out = _pictures(options.data, options.reference)
    rows: dict[str, Quality | Compared] = {}
    stop = None
    with progress("evaluate", len(pictures)) as tick:
        try:
            for name, paths in pictures.items():
                try:
                    row, *shown = _measure(paths, scale, net)
                    if options.picture and not rows:
                        write_picture("evaluate", options.picture, Picture((side_by_side(*shown),)))
                except (ValueError, MemoryError, RuntimeError) as error:
                    reason = str(error).removeprefix(f"{paths[0]}: ").removeprefix("evaluate: ")
                    skipped.append(f"{name}: {reason}")
                else:
                    rows[name] = row
                tick(name)
        except KeyboardInterrupt:
            if not rows:
                raise
            done = f"{len(rows)} of {len(pictures)} pictures"
            stop = Interrupted(f"stopped; {done} were measured. To measure all:", resumes=False)
    if not rows:
        raise InputError(f"evaluate: expected --data to hold pictures that can be used, got none{first_of(skipped)}")
    _print(rows, scale)
    for line in skipped:
        print(f"skipped {line}")
    if left_out:
        print(left_out)
    if options.json:
        measured: Any = {name: row._asdict() for name, row in rows.items()}
        numbers = {"scale": scale, "model": options.model, "pictures": measured, "skipped": skipped}
        numbers |= {"reference": str(options.reference)} if options.reference else {}
        write_json(options.json, {**numbers, "interrupted": stop is not None})
    if stop:
        raise stop
    return 1 if skipped else 0


def _measure(paths: tuple[Path, ...], scale: int, net: SuperResolutionNet | None) -> tuple[Any, ...]:
    """Numbers of a picture, and luminances to show side by side; of a picture alone, or of one and its reference."""
    from fastdense.sr.images import read_bytes
    from fastdense.sr.quality import compare_images, evaluate_image, luminance

    picture = read_bytes(paths[0])
    if len(paths) == 2:
        return compare_images(picture, read_bytes(paths[1]), scale)
    quality, bicubic, made = evaluate_image(picture, scale, net)
    return quality, bicubic, made, luminance(picture)


def _pictures(data: str, reference: Path | None) -> tuple[dict[str, tuple[Path, ...]], list[str], str | None]:
    """Pictures by their path in the folder, each perhaps with its reference; what is missing; what was left out."""
    from fastdense.bench.photographs import scikit_image_folder
    from fastdense.sr.images import search_folder

    if data == PHOTOGRAPHS and reference is None:
        folder = scikit_image_folder("evaluate")
        return {name: (folder / name,) for name in PHOTOGRAPH_FILES}, [], None
    found = {}
    for option, place in (("--data", Path(data)), ("--reference", reference)):
        if place is None:
            continue
        if not place.is_dir():
            known = f"{PHOTOGRAPHS!r} or a folder" if option == "--data" else "a folder"
            raise InputError(f"evaluate: expected {option} to be {known}, got {place}")
        found[option] = search_folder(place)
        if not found[option].pictures:
            raise InputError(f"evaluate: expected {option} to hold pictures, got none in {place}")
    failed = [line for one in found.values() for line in one.failed]
    left_out = found["--data"].left_out()
    given = {path.relative_to(data).as_posix(): path for path in found["--data"].pictures}
    if reference is None:
        return {name: (path,) for name, path in given.items()}, failed, left_out
    wanted = {path.relative_to(reference).as_posix(): path for path in found["--reference"].pictures}
    failed += [f"{name}: not in {data}" for name in wanted if name not in given]
    failed += [f"{name}: not in {reference}" for name in given if name not in wanted]
    return {name: (given[name], wanted[name]) for name in wanted if name in given}, failed, left_out


def _print(rows: dict[str, Any], scale: int) -> None:
    with extra("cli"):
        from rich import box
        from rich.table import Table
    columns: Any = zip(*rows.values(), strict=True)
    means: Any = [None if None in column else statistics.mean(column) for column in columns]
    first = next(iter(rows.values()))
    compared = not hasattr(first, "bicubic_psnr")
    headings = ["dB", "SSIM"] if compared else ["bicubic dB", "SSIM"]
    if not compared and first.psnr is not None:
        headings += ["model dB", "SSIM", "gain dB"]
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column(f"picture, x{scale}", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in {**rows, "mean": type(first)(*means)}.items():
        cells = [f"{row[0]:.3f}", f"{row[1]:.4f}"]
        if len(headings) == 5:
            cells += [f"{row.psnr:.3f}", f"{row.ssim:.4f}", f"{row.psnr - row.bicubic_psnr:+.3f}"]
        table.add_row(name, *cells)
    console().print(table)
    how = "" if compared else ", small pictures by MATLAB's bicubic"
    console().print(f"Luminance, {scale} pixels shaved at each border{how}.")

# SPDX-License-Identifier: Apache-2.0
"""Measures picture files against Pillow: ``python -m benchmarks.picture_targets --json FILE``.

What ``fastdense resize --preset pillow`` does of one photograph (read, resample, write) beside Pillow with the same
settings: JPEG at quality 95 without halved colour, lossy WebP at 95, PNG as Pillow packs it. Samples of both results
must be the same before a time is believed; both take turns in one process, ratios are medians over rounds. A row a
stage, and one for all three. Files lie in memory where the system has ``/dev/shm``: fastdense waits until they are on
the disk, and Pillow does not. ``--quick`` takes a small picture, to see that the script works.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image

from benchmarks.turns import Row, parser_of, report, row_of_times
from fastdense.bench.photographs import scikit_image_folder
from fastdense.sr.images import read_picture, write_picture
from fastdense.sr.resize_samples import resize_samples

_MEMORY = Path("/dev/shm")
# What Pillow is told so that it writes what the commands write.
SETTINGS: dict[str, dict[str, Any]] = {
    ".png": {},
    ".jpg": {"quality": 95, "subsampling": 0},
    ".webp": {"quality": 95, "exact": False},
}


class Files:
    """One photograph in a format, and where the results of both go."""

    def __init__(self, folder: Path, suffix: str, side: int, scale: float) -> None:
        with Image.open(scikit_image_folder("benchmark") / "astronaut.png") as photograph:
            large = photograph.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        self.suffix, self.settings = suffix, SETTINGS[suffix]
        self.read = folder / f"in{suffix}"
        large.save(self.read, **self.settings)
        self.theirs, self.ours = folder / f"pillow{suffix}", folder / f"fastdense{suffix}"
        self.size = (round(side * scale), round(side * scale))
        self.picture = read_picture(self.read)

    def read_by_pillow(self) -> Image.Image:
        with Image.open(self.read) as picture:
            picture.load()
        return picture

    def resample_by_pillow(self, picture: Image.Image) -> Image.Image:
        return picture.resize(self.size, Image.Resampling.BICUBIC)

    def resample(self, samples: numpy.ndarray) -> numpy.ndarray:
        return resize_samples(samples, self.size[::-1], None, "pillow")

    def write(self, samples: numpy.ndarray) -> None:
        write_picture("benchmark", self.ours, self.picture.with_frames((samples,)))

    def all_by_pillow(self) -> None:
        self.resample_by_pillow(self.read_by_pillow()).save(self.theirs, **self.settings)

    def all(self) -> None:
        self.write(self.resample(read_picture(self.read).samples))

    def check(self) -> None:
        """A wrong result is not timed."""
        self.all_by_pillow()
        self.all()
        with Image.open(self.theirs) as theirs, Image.open(self.ours) as ours:
            if not numpy.array_equal(numpy.asarray(theirs), numpy.asarray(ours)):
                raise SystemExit(f"{self.suffix}: the samples that fastdense wrote are not those of Pillow")

    def stages(self) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
        """Pillow's and fastdense's way, by name."""
        picture = self.read_by_pillow()
        small = self.resample_by_pillow(picture)
        made = numpy.asarray(small)
        return {
            "read": (self.read_by_pillow, lambda: read_picture(self.read)),
            "resample": (
                lambda: self.resample_by_pillow(picture),
                lambda: self.resample(self.picture.samples),
            ),
            "write": (lambda: small.save(self.theirs, **self.settings), lambda: self.write(made)),
            "all": (self.all_by_pillow, self.all),
        }


def measure(suffix: str, side: int, scale: float, rounds: int) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        files = Files(Path(folder), suffix, side, scale)
        files.check()
        for name, (theirs, ours) in files.stages().items():
            what = f"{suffix}, {side} x {side} to {files.size[0]} x {files.size[1]}, {name}, ms"
            rows.append(row_of_pair(what, theirs, ours, rounds))
    return rows


def row_of_pair(what: str, theirs: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> Row:
    """Milliseconds of both in turns, and the median of the ratios within one round."""
    row = row_of_times(what, {"plain": theirs, "plain-channels-last": lambda: None, "fastdense": ours}, rounds)
    pairs = zip(row["samples"]["fastdense"], row["samples"]["plain"], strict=True)
    values = {"Pillow": row["values"]["plain"], "fastdense": row["values"]["fastdense"]}
    return {"what": what, "values": values, "ratios": {"fastdense": statistics.median(a / b for a, b in pairs)}}


def main() -> None:
    parser = parser_of(__doc__, 15)
    parser.add_argument("--side", type=int, default=1500, help="of the picture; default: %(default)s")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as Pillow has
    side, rounds = (200, 2) if options.quick else (options.side, options.rounds)
    rows = [row for suffix in SETTINGS for scale in (0.5, 2.0) for row in measure(suffix, side, scale, rounds)]
    report(rows, options.json, side=side, rounds=rounds)


if __name__ == "__main__":
    main()

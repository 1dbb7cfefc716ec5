# SPDX-License-Identifier: Apache-2.0
"""A picture as a file means it: samples, frames, and what the file says about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from fastdense._support import InputError


class CorruptImageError(InputError):
    """A picture file cannot be read: damaged, forbidden, no picture, or one whose meaning is not certain."""


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a file says besides its samples.

    Attributes:
        icc: the colour profile of the samples.
        exif: a ``PIL.Image.Exif`` without orientation, thumbnail and what describes the file's layout.
        xmp: an XMP packet without orientation.
        dpi: pixels per inch, horizontal and vertical.
        text: of PNG, by keyword.
        comment: of JPEG and GIF.
        chunks: of PNG, those that say what its colours mean (gAMA, cHRM, sRGB, cICP).
        quality: of JPEG, what its tables say, 1 to 100.
        lossless: whether a WebP keeps every sample.
    """

    icc: bytes | None = None
    exif: Any = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    text: Mapping[str, str] = dataclasses.field(default_factory=dict)
    comment: bytes | None = None
    chunks: tuple[tuple[bytes, bytes], ...] = ()
    quality: int | None = None
    lossless: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """Frames of one shape and type, upright.

    Attributes:
        frames: ``[H, W]`` or ``[H, W, C]``: grey, grey and alpha, RGB, RGB and alpha for one to four channels.
        metadata: see there.
        durations: of the frames of an animation, in milliseconds.
        loop: how often an animation runs, 0 for ever, None once.
        notes: what the reader left out, a sentence each.
    """

    frames: tuple[numpy.ndarray, ...]
    metadata: Metadata = dataclasses.field(default_factory=Metadata)
    durations: tuple[float, ...] = ()
    loop: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def samples(self) -> numpy.ndarray:
        """The only frame, or the first."""
        return self.frames[0]

    def with_frames(self, frames: tuple[numpy.ndarray, ...]) -> Picture:
        return dataclasses.replace(self, frames=frames)


def check_alike(path: Path, shapes: Sequence[tuple[int, ...]], types: Sequence[numpy.dtype]) -> None:
    """Raises:
    CorruptImageError: frames of several sizes or types, which no command could treat alike.
    """
    if len(set(shapes)) > 1 or len(set(types)) > 1:
        several = ", ".join(dict.fromkeys(f"{s[1]} x {s[0]} {t}" for s, t in zip(shapes, types, strict=True)))
        raise CorruptImageError(
            f"{path}: expected frames of one size and type, got {len(shapes)} of {several}; "
            f"give --frame N (1 to {len(shapes)})"
        )


def channels_of(samples: numpy.ndarray) -> int:
    return samples.shape[2] if samples.ndim == 3 else 1


# What turns stored samples upright, by EXIF orientation.
_UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def upright(samples: numpy.ndarray, orientation: int) -> numpy.ndarray:
    """Samples as a viewer shows them."""
    turn = _UPRIGHT.get(orientation)
    return samples if turn is None else numpy.ascontiguousarray(turn(samples))

# SPDX-License-Identifier: Apache-2.0
"""What the formats of picture files can hold, by file ending."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy

from fastdense._support import InputError, extra
from fastdense.sr.images.picture import channels_of

_BYTES = frozenset(["uint8"])
_DEEP = frozenset(["uint8", "uint16"])
_ANY = frozenset(["uint8", "uint16", "uint32", "int8", "int16", "int32", "float32", "float64"])
_OPAQUE = frozenset([1, 3])
_ALL = frozenset([1, 2, 3, 4])


class Format(NamedTuple):
    """What a format can hold.

    Attributes:
        name: Pillow's.
        types: of samples, by numpy's names.
        channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
        longest: pixels of a side.
        frames: whether it holds several.
        keeps: of icc, exif, xmp, dpi, text, comment.
        lossy: whether --quality means something.
    """

    name: str
    types: frozenset[str]
    channels: frozenset[int]
    longest: int
    frames: bool = False
    keeps: frozenset[str] = frozenset()
    lossy: bool = False


_PNG = Format("PNG", _DEEP, _ALL, 2**31 - 1, True, frozenset(["icc", "exif", "xmp", "dpi", "text"]))
_TIFF = Format("TIFF", _ANY, _ALL, 2**31 - 1, True, frozenset(["icc", "exif", "xmp", "dpi"]))
_JPEG = Format("JPEG", _BYTES, _OPAQUE, 65500, False, frozenset(["icc", "exif", "xmp", "dpi", "comment"]), True)
_WEBP = Format("WEBP", _BYTES, _ALL, 16383, True, frozenset(["icc", "exif", "xmp"]), True)
_AVIF = Format("AVIF", _BYTES, _ALL, 65536, True, frozenset(["icc", "exif", "xmp"]), True)
_PPM = Format("PPM", _DEEP, _OPAQUE, 2**31 - 1)

FORMATS = {
    ".avif": _AVIF,
    ".bmp": Format("BMP", _BYTES, _OPAQUE, 2**31 - 1, keeps=frozenset(["dpi"])),
    ".gif": Format("GIF", _BYTES, _OPAQUE, 65535, True, frozenset(["comment"])),
    ".jfif": _JPEG,
    ".jpeg": _JPEG,
    ".jpg": _JPEG,
    ".pgm": _PPM._replace(channels=frozenset([1])),
    ".png": _PNG,
    ".pnm": _PPM,
    ".ppm": _PPM,
    ".tga": Format("TGA", _BYTES, _ALL, 65535),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".webp": _WEBP,
}
# Endings of picture files.
SUFFIXES = frozenset(FORMATS)
# What Pillow may open a file as. Others run programs (EPS), or are no pictures.
READABLE = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP")
# What a message proposes to write instead.
_ADVISED = (".png", ".tif", ".webp", ".bmp", ".ppm")
_NAMES = {1: "grey", 2: "grey with alpha", 3: "RGB", 4: "RGB with alpha"}


def find_format(command: str, path: Path) -> Format:
    """The format of a file to write, by its ending.

    Raises:
        InputError: an ending that is not known, or that this Pillow cannot write; the message begins with ``command``.
    """
    known = FORMATS.get(path.suffix.lower())
    if known is None:
        raise InputError(f"{command}: expected OUT to end in {', '.join(sorted(SUFFIXES))}, got {path}")
    if known.name == "AVIF":
        with extra("cli"):
            from PIL import features
        if not features.check("avif"):
            raise InputError(f"{command}: expected a Pillow that writes AVIF for {path}, got one that cannot")
    return known


class Kind(NamedTuple):
    """What a format has to hold: numpy's name of the type, channels, height and width, frames."""

    dtype: str
    channels: int
    size: tuple[int, int]
    frames: int = 1


def kind_of(frames: Sequence[numpy.ndarray]) -> Kind:
    return Kind(str(frames[0].dtype), channels_of(frames[0]), frames[0].shape[:2], len(frames))


def check_format(command: str, path: Path, kind: Kind) -> Format:
    """Refuses a picture that a file cannot hold, before it is made.

    Args:
        command: beginning of the message.
        path: of the file.
        kind: of the picture.

    Raises:
        InputError: something would be lost; the message says what, and what to write instead.
    """
    known = find_format(command, path)
    lost = _refusal(known, kind)
    if lost is None:
        return known
    others = [suffix for suffix, other in FORMATS.items() if _refusal(other, kind) is None and suffix in _ADVISED]
    ways = [f"write {' or '.join(others)}"] if others else []
    if kind.channels in (2, 4):
        ways.append("give --flatten COLOUR")
    if kind.dtype not in known.types:
        ways.append("give --depth 8")
    if kind.frames > 1 and not known.frames:
        ways.append(f"give --frame N (1 to {kind.frames})")
    (height, width), many = kind.size, f", {kind.frames} frames" if kind.frames > 1 else ""
    raise InputError(
        f"{command}: the format of {path} cannot store {lost} of this picture ({width} x {height}, "
        f"{_NAMES[kind.channels]}, {kind.dtype}{many}); {', or '.join(ways) or 'make it smaller'}"
    )


def _refusal(known: Format, kind: Kind) -> str | None:
    """What of a picture a format cannot hold."""
    if kind.dtype not in known.types or (kind.frames > 1 and known.name == "PNG" and kind.dtype != "uint8"):
        return f"the {8 * numpy.dtype(kind.dtype).itemsize} bits"
    if kind.channels not in known.channels:
        return "the alpha" if kind.channels in (2, 4) else "the colours"
    if max(kind.size) > known.longest:
        return "the size"
    if kind.frames > 1 and not known.frames:
        return f"the {kind.frames} frames"
    return None

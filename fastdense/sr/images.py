# SPDX-License-Identifier: Apache-2.0
"""Picture files: finding them, and opening them as RGB with corrupt ones told apart."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from fastdense._support import InputError, extra, write_atomically

if TYPE_CHECKING:
    from PIL import Image


SUFFIXES = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"])


# Mean and standard deviation of ImageNet's training images, per RGB channel in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)


_KEPT_MODES = ("L", "LA", "RGB", "RGBA", "I;16", "F")


_PNG_START = b"\x89PNG\r\n\x1a\n"


class CorruptImageError(Exception):
    """A picture file cannot be decoded to its end."""


def find_images(folder: Path) -> list[Path]:
    """Lists the picture files below `folder` in sorted order; hidden files are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def open_rgb(path: Path) -> Image.Image:
    """Decodes a picture file completely, as RGB; raises what :func:`open_image` does."""
    return open_image(path, "RGB")


def open_image(path: Path, mode: str | None = None) -> Image.Image:
    """Decodes a picture file completely, in its own mode or another.

    Raises:
        CorruptImageError: the file is truncated, broken, or no picture at all.
    """
    with extra("cli"):
        from PIL import Image
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.convert(mode) if mode else picture.copy()
    except (
        OSError,
        SyntaxError,  # Pillow's word for a broken PNG chunk
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise CorruptImageError(f"{path}: {error}") from error


def image_pairs(command: str, source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Which picture goes where: one file, or every picture below a folder.

    Raises:
        InputError: there is nothing to read; the message begins with ``command``.
    """
    if source.is_file():
        return [(source, target / source.name if target.is_dir() else target)]
    if not source.is_dir():
        raise InputError(f"{command}: expected IN to be a picture or a folder, got {source}")
    if target.is_file():
        raise InputError(f"{command}: expected OUT to be a folder like IN, got the file {target}")
    found = find_images(source)
    if not found:
        raise InputError(
            f"{command}: expected IN to hold pictures ({', '.join(sorted(SUFFIXES))}), got none in {source}"
        )
    return [(path, target / path.relative_to(source)) for path in found]


def read_samples(path: Path) -> numpy.ndarray:
    """``[H, W]`` or ``[H, W, C]`` of uint8, uint16 or float32; palettes become colours, alpha and 16 bits stay.

    Raises:
        CorruptImageError: as :func:`open_image`.
        InputError: a PNG of 16 bits and colours, and no OpenCV to read it: Pillow would drop half of the bits.
    """
    with open(path, "rb") as file:
        start = file.read(26)
    if start[:8] == _PNG_START and start[24:25] == b"\x10" and start[25:26] != b"\0":
        return _read_deep_colours(path)
    picture = open_image(path)
    if picture.mode not in _KEPT_MODES:
        transparent = "transparency" in picture.info or picture.mode == "PA"
        picture = picture.convert("RGBA" if transparent else "RGB")
    return numpy.asarray(picture)


def _read_deep_colours(path: Path) -> numpy.ndarray:
    cv2 = _opencv(path)
    samples = cv2.imdecode(numpy.fromfile(path, numpy.uint8), cv2.IMREAD_UNCHANGED)
    if samples is None:
        raise CorruptImageError(f"{path}: OpenCV cannot decode it")
    return samples[..., [2, 1, 0, 3][: samples.shape[2]]]


def _opencv(path: Path) -> Any:
    try:
        import cv2
    except ImportError as error:
        raise InputError(
            f"fastdense: {path} is a 16-bit colour PNG, which needs OpenCV; run: pip install opencv-python-headless"
        ) from error
    return cv2


def write_samples(command: str, path: Path, samples: numpy.ndarray) -> None:
    """Writes what :func:`read_samples` reads, whole or not at all, in the format of the file's ending."""
    with extra("cli"):
        from PIL import Image
    check_suffix(command, path)
    if samples.dtype == numpy.uint16 and samples.ndim == 3:
        if path.suffix.lower() != ".png":
            raise InputError(f"{command}: expected OUT to end in .png for 16 bits and colours, got {path}")
        content = _opencv(path).imencode(".png", samples[..., [2, 1, 0, 3][: samples.shape[2]]])[1].tobytes()
    else:
        buffer = io.BytesIO()
        try:
            Image.fromarray(samples).save(buffer, format=Image.registered_extensions()[path.suffix.lower()])
        except OSError as error:  # a JPEG with alpha, for instance
            raise InputError(f"{command}: the format of {path} cannot store this picture: {error}") from error
        content = buffer.getvalue()
    write_atomically(path, lambda file: file.write(content))


def check_suffix(command: str, path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{command}: expected OUT to end in {', '.join(sorted(SUFFIXES))}, got {path}")

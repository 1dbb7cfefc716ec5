# SPDX-License-Identifier: Apache-2.0
"""Picture files: finding them, and opening them as RGB with corrupt ones told apart."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from fastdense._support import extra

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"])

# Mean and standard deviation of ImageNet's training images, per RGB channel in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class CorruptPictureError(Exception):
    """A picture file cannot be decoded to its end."""


def find_pictures(folder: Path) -> list[Path]:
    """Lists the picture files below `folder` in sorted order; hidden files are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def open_rgb(path: Path) -> Image.Image:
    """Decodes a picture file completely, as RGB; raises what :func:`open_picture` does."""
    return open_picture(path, "RGB")


def open_picture(path: Path, mode: str | None = None) -> Image.Image:
    """Decodes a picture file completely, in its own mode or another.

    Raises:
        CorruptPictureError: the file is truncated, broken, or no picture at all.
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
        raise CorruptPictureError(f"{path}: {error}") from error

# SPDX-License-Identifier: Apache-2.0
"""The one writer of picture files: whole or not at all, and never less than the picture without a word."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy

from fastdense._support import InputError, MissingExtraError, extra, write_atomically
from fastdense.sr.images.formats import Format, check_format, kind_of
from fastdense.sr.images.metadata import png_chunks, save_options
from fastdense.sr.images.picture import Picture, channels_of
from fastdense.sr.images.png import encode_16_bits
from fastdense.sr.images.tiff import encode_tiff

# Where loss is asked for by the format: what is hard to tell from the original.
QUALITY = 95
# Pillow's TIFF ends there.
_MOST_TIFF = 2**31


def write_picture(command: str, path: Path, picture: Picture, quality: int | None = None) -> list[str]:
    """Writes a picture in the format of the file's ending.

    JPEG gets 4:4:4 and the larger of 95 and the quality of the file it was read from; WebP and AVIF get 95, but a WebP
    without loss stays so.

    Args:
        command: beginning of messages.
        path: of the file; it holds the old content or the new, never a part. A symbolic link is written through.
        picture: what to write.
        quality: of JPEG, WebP and AVIF, 1 to 100.

    Returns:
        What could not be kept, a sentence each.

    Raises:
        InputError: the format cannot hold the picture.
        OSError: the file cannot be written.
    """
    known = check_format(command, path, kind_of(picture.frames))
    try:
        content, notes = _encoded(known, picture, quality)
    except MissingExtraError:
        raise
    except Exception as error:  # each format fails in its own way
        raise InputError(f"{command}: expected {path} to hold the picture, got: {error}") from error
    write_atomically(path, lambda file: file.write(content))
    return notes


def _encoded(known: Format, picture: Picture, quality: int | None) -> tuple[bytes, list[str]]:
    samples = picture.samples
    deep = samples.dtype != numpy.uint8
    plain = samples.ndim == 2 and str(samples.dtype) in ("uint8", "uint16", "float32")
    total = sum(frame.nbytes for frame in picture.frames)
    if known.name == "TIFF" and (len(picture.frames) > 1 or (deep and not plain) or total >= _MOST_TIFF):
        return encode_tiff(picture)
    options, notes = save_options(picture.metadata, samples, known)
    if known.name == "PNG" and deep:
        return encode_16_bits(samples, png_chunks(options)), notes
    if known.name == "PPM" and deep:
        return _deep_ppm(samples), notes
    return _by_pillow(known, picture, options | _loss(known, picture, quality)), notes


def _loss(known: Format, picture: Picture, quality: int | None) -> dict[str, Any]:
    if known.name == "JPEG":
        return {"quality": quality or max(QUALITY, picture.metadata.quality or 0), "subsampling": 0}
    if known.name == "WEBP" and picture.metadata.lossless and quality is None:
        return {"lossless": True, "exact": True}
    if known.name == "WEBP":
        return {"quality": quality or QUALITY, "exact": channels_of(picture.samples) in (2, 4)}
    if known.name == "AVIF":
        return {"quality": quality or QUALITY, "subsampling": "4:4:4"}
    return {}


def _by_pillow(known: Format, picture: Picture, options: dict[str, Any]) -> bytes:
    with extra("cli"):
        from PIL import Image
    first, *others = (Image.fromarray(frame) for frame in picture.frames)
    if others:
        options |= {"save_all": True, "append_images": others}
        durations = [round(time) if known.name == "AVIF" else time for time in picture.durations]
        options |= {"duration": durations} if durations else {}
        options |= {"loop": picture.loop} if picture.loop is not None else {}
    buffer = io.BytesIO()
    first.save(buffer, format=known.name, **options)
    return buffer.getvalue()


def _deep_ppm(samples: numpy.ndarray) -> bytes:
    height, width = samples.shape[:2]
    magic = "P6" if samples.ndim == 3 else "P5"
    return f"{magic}\n{width} {height}\n65535\n".encode() + samples.astype(">u2").tobytes()

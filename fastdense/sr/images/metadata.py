# SPDX-License-Identifier: Apache-2.0
"""What picture files say besides their samples: colour profile, EXIF, XMP, resolution, text."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy

from fastdense.sr.images.formats import Format
from fastdense.sr.images.picture import Metadata, channels_of
from fastdense.sr.images.png import COLOUR_CHUNKS

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION = 0x0112
EXIF_IFD, GPS_IFD, INTEROP_IFD = 0x8769, 0x8825, 0xA005
_WIDTH, _HEIGHT, _EXIF_WIDTH, _EXIF_HEIGHT, _MAKER_NOTE = 0x0100, 0x0101, 0xA002, 0xA003, 0x927C
# Tags of the first directory that speak of the picture; in a TIFF most others speak of how its samples are stored.
# Document name, description, maker, model, software, date, artist, host, copyright.
TEXT_TAGS = (0x010D, 0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x013C, 0x8298)
_DESCRIPTION = 0x010E
# How descriptions begin that programs write about the layout of a TIFF: tifffile, ImageJ, OME.
_LAYOUTS = ('{"', "ImageJ=", "<?xml", "<OME")
# Those that describe a thumbnail or the layout, or that are written anew.
_DROPPED = frozenset([ORIENTATION, 0x0103, 0x0201, 0x0202, 0x014A, 0x02BC, 0x8773])
_XMP_KEY = "XML:com.adobe.xmp"
# Kept as EXIF and as XMP.
_PROFILE_TEXT = re.compile("Raw profile type (exif|APP1|xmp|icc|icm)|XML:com.adobe.xmp", re.IGNORECASE)
_MOST_DPI = 65535
_SPACES = {1: b"GRAY", 2: b"GRAY", 3: b"RGB ", 4: b"RGB "}
# A JPEG holds so many bytes of each.
_MOST_JPEG_EXIF, _MOST_JPEG_XMP, _MOST_JPEG_COMMENT = 65533, 65502, 65533
# The luminance table of the JPEG standard (annex K.1), in any order: at quality 50 it is used as it is.
_STANDARD_TABLE = (
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 "
    "18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"
)


def read_metadata(picture: Image.Image) -> tuple[Metadata, int]:
    """What a decoded picture of Pillow says, and the EXIF orientation of its samples."""
    info = picture.info
    exif, orientation = clean_exif(_exif_of(picture), is_tiff=picture.format == "TIFF")
    text = dict(getattr(picture, "text", None) or {})
    xmp = info.get("xmp") or text.get(_XMP_KEY)
    dpi = info.get("dpi")
    return (
        Metadata(
            icc=info.get("icc_profile") or None,
            exif=exif,
            xmp=_upright_xmp(xmp.encode() if isinstance(xmp, str) else xmp) if xmp else None,
            dpi=_valid_dpi(dpi) if dpi else None,
            text={key: value for key, value in text.items() if not _PROFILE_TEXT.match(key)},
            comment=_bytes(info.get("comment")),
            quality=jpeg_quality(getattr(picture, "quantization", None)),
        ),
        orientation,
    )


def _exif_of(picture: Image.Image) -> Any:
    with contextlib.suppress(Exception):  # damaged EXIF says nothing; the samples are whole
        return picture.getexif()
    return None


def _bytes(value: Any) -> bytes | None:
    return value.encode() if isinstance(value, str) else value or None


def _valid_dpi(dpi: Any) -> tuple[float, float] | None:
    with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):
        x, y = (float(value) for value in dpi)
        return (x, y) if 0 < x < 2**31 and 0 < y < 2**31 else None
    return None


def _upright_xmp(xmp: bytes) -> bytes:
    return re.sub(rb"(tiff:Orientation(?:=[\"']|>))\d", rb"\g<1>1", xmp)


def jpeg_quality(tables: Mapping[int, Any] | None) -> int | None:
    """Which quality of libjpeg has luminance tables that are as fine; 100 for the finest."""
    if not tables:
        return None
    standard = numpy.array(_STANDARD_TABLE.split(), int)
    found = sum(tables[min(tables)])
    for quality in range(1, 100):
        share = 5000 // quality if quality < 50 else 200 - 2 * quality
        if numpy.clip((standard * share + 50) // 100, 1, 255).sum() <= found:
            return quality
    return 100


def clean_exif(source: Any, is_tiff: bool) -> tuple[Any, int]:
    """A copy without orientation, thumbnail and layout, or None where nothing is left; and the orientation."""
    from PIL import Image

    if source is None:
        return None, 1
    made, orientation = Image.Exif(), 1
    with contextlib.suppress(Exception):
        orientation = int(source.get(ORIENTATION, 1))
        for tag in source:
            if tag in (EXIF_IFD, GPS_IFD) or tag in _DROPPED or (is_tiff and tag not in TEXT_TAGS):
                continue
            if tag == _DESCRIPTION and str(source[tag]).startswith(_LAYOUTS):
                continue
            made[tag] = source[tag]
        for tag in (EXIF_IFD, GPS_IFD):
            directory = dict(source.get_ifd(tag))
            if tag == EXIF_IFD:
                directory.pop(INTEROP_IFD, None)
                inner = dict(source.get_ifd(INTEROP_IFD))
                directory.update({INTEROP_IFD: inner} if inner else {})
            if directory:
                made[tag] = directory
    return (made if len(made) else None), orientation


def resized_exif(exif: Any, width: int, height: int) -> Any:
    """A copy that names another size, where it names one."""
    from PIL import Image

    made = Image.Exif()
    for tag in exif:
        made[tag] = {_WIDTH: width, _HEIGHT: height}.get(tag, exif[tag])
    directory = made.get(EXIF_IFD)
    if directory:
        sizes = {_EXIF_WIDTH: width, _EXIF_HEIGHT: height}
        made[EXIF_IFD] = {tag: sizes.get(tag, value) for tag, value in directory.items()}
    return made


def exif_bytes(exif: Any, width: int, height: int, most: int | None = None) -> bytes | None:
    """EXIF of a picture of that size; without the maker's notes where it would be longer than ``most``, or None."""
    made = resized_exif(exif, width, height)
    for _ in range(2):
        with contextlib.suppress(Exception):  # values of a type that does not belong to their tag
            content = made.tobytes()
            if most is None or len(content) <= most:
                return content
        made[EXIF_IFD] = {k: v for k, v in (made.get(EXIF_IFD) or {}).items() if k != _MAKER_NOTE}
    return None


def fitting_profile(metadata: Metadata, samples: numpy.ndarray, known: Format) -> tuple[bytes | None, str | None]:
    """The colour profile to write, and a word where it has to be left out."""
    icc = metadata.icc
    if not icc:
        return None, None
    if "icc" not in known.keeps:
        return None, f"its colour profile is left out, since {known.name} holds none; colours are shown as sRGB"
    if icc[36:40] != b"acsp":
        return None, "its colour profile is left out, since it is damaged"
    if icc[16:20] != _SPACES[channels_of(samples)]:
        space = icc[16:20].decode("latin-1").strip()
        return None, f"its colour profile is left out, since it is for {space} and the samples are not"
    return icc, None


def png_colour_chunks(info: Mapping[Any, Any]) -> tuple[tuple[bytes, bytes], ...]:
    """gAMA, cHRM and sRGB as Pillow read them."""
    made = []
    if "chromaticity" in info:
        made.append((b"cHRM", struct.pack(">8I", *(round(value * 100000) for value in info["chromaticity"]))))
    if "gamma" in info:
        made.append((b"gAMA", struct.pack(">I", round(info["gamma"] * 100000))))
    if "srgb" in info:
        made.append((b"sRGB", bytes([info["srgb"]])))
    return tuple(made)


def save_options(metadata: Metadata, samples: numpy.ndarray, known: Format) -> tuple[dict[str, Any], list[str]]:
    """Arguments of Pillow's ``save`` that keep metadata in a format, and what could not be kept."""
    height, width = samples.shape[:2]
    options: dict[str, Any] = {}
    icc, word = fitting_profile(metadata, samples, known)
    notes = [word] if word else []
    is_jpeg = known.name == "JPEG"

    def keep(name: str, content: bytes, most: int) -> None:
        if is_jpeg and len(content) > most:
            notes.append(f"its {name} is left out, since JPEG holds {most} bytes of it and it has {len(content)}")
        else:
            options[name] = content

    if icc:
        options["icc_profile"] = icc
    if metadata.exif is not None and "exif" in known.keeps:
        content = exif_bytes(metadata.exif, width, height, _MOST_JPEG_EXIF if is_jpeg else None)
        options.update({"exif": content} if content else {})
        notes += [] if content else ["its EXIF is left out, since it is too long or damaged"]
    if metadata.xmp and "xmp" in known.keeps and known.name != "PNG":
        keep("xmp", metadata.xmp, _MOST_JPEG_XMP)
    if metadata.dpi and "dpi" in known.keeps and max(metadata.dpi) <= _MOST_DPI:
        whole = known.name in ("JPEG", "BMP")
        options["dpi"] = tuple(round(value) if whole else value for value in metadata.dpi)
    if metadata.comment and "comment" in known.keeps:
        keep("comment", metadata.comment, _MOST_JPEG_COMMENT)
    if known.name == "PNG":
        options["pnginfo"] = _png_info(metadata)
    return options, notes


def _png_info(metadata: Metadata) -> Any:
    from PIL import PngImagePlugin

    made = PngImagePlugin.PngInfo()
    for kind, data in metadata.chunks:
        made.add(kind, data)
    if metadata.xmp:
        made.add_itxt(_XMP_KEY, metadata.xmp.decode("utf-8", "replace"))
    for key, value in metadata.text.items():
        made.add_text(key, value, zip=len(value) > 1024)
    return made


def png_chunks(options: Mapping[str, Any]) -> list[tuple[bytes, bytes]]:
    """The chunks that Pillow writes for :func:`save_options`, in front of the samples."""
    import zlib

    from PIL.PngImagePlugin import PngInfo

    info: PngInfo = options["pnginfo"]
    given = [(chunk[0], chunk[1]) for chunk in info.chunks]
    made = [pair for pair in given if pair[0] in COLOUR_CHUNKS]
    if "icc_profile" in options:
        made.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(options["icc_profile"])))
    if "dpi" in options:
        x, y = (int(value / 0.0254 + 0.5) for value in options["dpi"])
        made.append((b"pHYs", struct.pack(">IIB", x, y, 1)))
    if "exif" in options:
        made.append((b"eXIf", options["exif"].removeprefix(b"Exif\0\0")))
    return made + [pair for pair in given if pair[0] not in COLOUR_CHUNKS]

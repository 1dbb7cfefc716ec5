# SPDX-License-Identifier: Apache-2.0
"""TIFF of every type of samples, by tifffile; what Pillow reads as well stays with Pillow."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy

from fastdense._support import extra
from fastdense.sr.images.formats import FORMATS
from fastdense.sr.images.limits import check_fits
from fastdense.sr.images.metadata import (
    EXIF_IFD,
    GPS_IFD,
    TEXT_TAGS,
    clean_exif,
    fitting_profile,
    resized_exif,
)
from fastdense.sr.images.picture import CorruptImageError, Metadata, Picture, channels_of, check_alike, upright

_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MINISWHITE, _MINISBLACK, _RGB, _SEPARATED = 0, 1, 2, 5
_PREMULTIPLIED, _STRAIGHT = 1, 2
_INCH, _CENTIMETRE = 2, 3
# Directories are written behind the samples; until it is known where, a tag next to theirs that nobody uses.
_PLACEHOLDERS = {EXIF_IFD: EXIF_IFD - 1, GPS_IFD: GPS_IFD - 2}


def is_tiff(start: bytes) -> bool:
    return start.startswith(_STARTS)


@contextlib.contextmanager
def quiet_opencv() -> Iterator[None]:
    """Without what OpenCV prints of damaged files; errors say it."""
    from cv2.utils import logging

    before = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        logging.setLogLevel(before)


class Tiff:
    """The pictures of a file: their pages but for thumbnails and masks."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self.file = path, file
        self.pages = [page for page in file.pages if not (page.is_reduced or page.is_mask)]
        if not self.pages:
            raise CorruptImageError(f"{path}: expected a picture, got a TIFF of thumbnails and masks only")
        self.stacked = len(self.pages) == 1 and file.series and file.series[0].size > self.pages[0].size

    @property
    def frames(self) -> int:
        return self.file.series[0].size // self.pages[0].size if self.stacked else len(self.pages)

    @property
    def needs_tifffile(self) -> bool:
        """Pillow reads bits and bytes, more kinds of them than tifffile."""
        page = self.pages[0]
        return page.bitspersample > 8 or page.sampleformat not in (1, 4) or bool(self.stacked)

    def check_channels(self) -> int:
        """How many samples of a pixel are colours.

        Raises:
            CorruptImageError: a channel whose meaning the file does not tell.
        """
        page = self.pages[0]
        colours = {_MINISWHITE: 1, _MINISBLACK: 1, _RGB: 3}.get(page.photometric)
        if colours is None:
            if self.needs_tifffile:
                name = getattr(page.photometric, "name", page.photometric)
                raise CorruptImageError(f"{self.path}: expected grey or RGB samples of {page.dtype}, got {name}")
            return page.samplesperpixel
        extras = page.samplesperpixel - colours
        kinds = [int(kind) for kind in page.extrasamples]
        if extras > 1 or (extras == 1 and kinds not in ([], [_PREMULTIPLIED], [_STRAIGHT])):
            raise CorruptImageError(
                f"{self.path}: expected {colours} channels and perhaps alpha, got {page.samplesperpixel} channels "
                f"whose meaning the file does not tell"
            )
        return colours

    def read(self, chosen: list[int]) -> list[numpy.ndarray]:
        """Frames by their numbers from 0."""
        page, colours = self.pages[0], self.check_channels()
        if str(page.dtype) not in FORMATS[".tif"].types:
            raise CorruptImageError(f"{self.path}: expected samples of 8, 16 or 32 bits or float64, got {page.dtype}")
        check_fits(f"{self.path}: a picture", len(chosen) * page.size * page.dtype.itemsize)
        if self.stacked:
            stack = self.file.series[0].asarray().reshape(self.frames, *page.shape)
            return [self._samples(stack[at], page, colours) for at in chosen]
        return [self._samples(self._decoded(self.pages[at]), self.pages[at], colours) for at in chosen]

    def _decoded(self, page: Any) -> numpy.ndarray:
        try:
            return page.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            return self._by_opencv(page, error)

    def _by_opencv(self, page: Any, error: ValueError) -> numpy.ndarray:
        """OpenCV brings LZW and others with it, for the first page."""
        with contextlib.suppress(ImportError):
            import cv2

            with quiet_opencv():
                samples = cv2.imread(str(self.path), cv2.IMREAD_UNCHANGED) if page.index == 0 else None
            if samples is not None and page.photometric in (_MINISBLACK, _RGB):
                samples = samples[..., [2, 1, 0, 3][: samples.shape[2]]] if samples.ndim == 3 else samples
                if samples.dtype == page.dtype and samples.size == page.size and page.axes in ("YX", "YXS"):
                    return samples
        raise CorruptImageError(f"{self.path}: {error}; run: pip install imagecodecs") from error

    def _samples(self, array: numpy.ndarray, page: Any, colours: int) -> numpy.ndarray:
        if page.axes == "SYX":
            array = numpy.moveaxis(array, 0, -1)
        elif page.axes not in ("YX", "YXS"):
            raise CorruptImageError(f"{self.path}: expected pictures of height and width, got axes {page.axes}")
        samples = array.astype(array.dtype.newbyteorder("="))
        if page.photometric == _MINISWHITE:
            samples = self._inverted(samples)
        if samples.ndim == 3 and samples.shape[2] > colours and list(page.extrasamples) == [_PREMULTIPLIED]:
            from fastdense.sr.resize_samples import unpremultiplied

            samples = unpremultiplied(samples.astype(numpy.float64), samples.dtype)
        return samples[..., 0] if samples.ndim == 3 and samples.shape[2] == 1 else samples

    def _inverted(self, samples: numpy.ndarray) -> numpy.ndarray:
        if not numpy.issubdtype(samples.dtype, numpy.unsignedinteger) or samples.ndim == 3:
            raise CorruptImageError(f"{self.path}: expected black to be 0, got {samples.dtype} whose white is 0")
        return numpy.iinfo(samples.dtype).max - samples

    def metadata(self) -> tuple[Metadata, int]:
        """What the first page says, and its orientation."""
        tags = self.pages[0].tags
        icc, xmp = tags.get(34675), tags.get(700)
        exif, orientation = None, int(getattr(tags.get(274), "value", 1))
        with contextlib.suppress(Exception):  # BigTIFF, and damaged directories
            from PIL import Image

            source = Image.Exif()
            self.file.filehandle.seek(0)
            source.load_from_fp(self.file.filehandle)
            exif, _ = clean_exif(source, is_tiff=True)
        return (
            Metadata(
                icc=bytes(icc.value) if icc else None,
                exif=exif,
                xmp=bytes(xmp.value) if xmp else None,
                dpi=self._dpi(),
            ),
            orientation,
        )

    def _dpi(self) -> tuple[float, float] | None:
        tags = self.pages[0].tags
        unit = int(getattr(tags.get(296), "value", _INCH))
        with contextlib.suppress(AttributeError, TypeError, ValueError, ZeroDivisionError):
            x, y = (tags.get(code).value for code in (282, 283))
            scale = {_INCH: 1.0, _CENTIMETRE: 2.54}.get(unit)
            return None if scale is None else (scale * x[0] / x[1], scale * y[0] / y[1])
        return None


@contextlib.contextmanager
def open_tiff(path: Path) -> Iterator[Tiff]:
    """Raises:
    MissingExtraError: tifffile is not installed.
    """
    with extra("cli"):
        import tifffile
    with tifffile.TiffFile(path) as file:
        yield Tiff(path, file)


def read_tiff(tiff: Tiff, chosen: list[int]) -> Picture:
    metadata, orientation = tiff.metadata()
    pages = [tiff.pages[0 if tiff.stacked else at] for at in chosen]
    shapes = [(page.imagelength, page.imagewidth, page.samplesperpixel) for page in pages]
    check_alike(tiff.path, shapes, [page.dtype for page in pages])
    return Picture(tuple(upright(frame, orientation) for frame in tiff.read(chosen)), metadata)


def encode_tiff(picture: Picture) -> tuple[bytes, list[str]]:
    """A TIFF of any type of samples, a page a frame; and what could not be kept."""
    with extra("cli"):
        import tifffile
    samples, metadata = picture.samples, picture.metadata
    icc, word = fitting_profile(metadata, samples, FORMATS[".tif"])
    height, width = samples.shape[:2]
    exif = resized_exif(metadata.exif, width, height) if metadata.exif is not None else {}
    options: dict[str, Any] = {
        "photometric": "rgb" if channels_of(samples) >= 3 else "minisblack",
        "extrasamples": ["unassalpha"] if channels_of(samples) in (2, 4) else None,
        "planarconfig": "contig" if samples.ndim == 3 else None,
        "iccprofile": icc,
        "metadata": None,
        "software": exif.get(0x0131) or False,
        "datetime": exif.get(0x0132),
        "description": exif.get(0x010E),
    }
    if metadata.dpi:
        options |= {"resolution": metadata.dpi, "resolutionunit": _INCH}
    tags: list[Any] = [
        (tag, "s", 0, str(exif[tag]), True) for tag in TEXT_TAGS if tag in exif and tag not in (0x010E, 0x0131, 0x0132)
    ]
    tags += [(700, "B", len(metadata.xmp), metadata.xmp, True)] if metadata.xmp else []
    directories = {tag: exif[tag] for tag in (EXIF_IFD, GPS_IFD) if exif.get(tag)}
    big = sum(frame.nbytes for frame in picture.frames) > 2**32 - 2**25
    if not big:
        tags += [(_PLACEHOLDERS[tag], "I", 1, 0, True) for tag in directories]
    file = io.BytesIO()
    with tifffile.TiffWriter(file, bigtiff=big) as writer:
        for frame in picture.frames:
            writer.write(frame, extratags=tags, **options)
            tags = []
    if directories and not big:
        _append_directories(file, directories)
    return file.getvalue(), [word] if word else []


def _append_directories(file: io.BytesIO, directories: dict[int, Any]) -> None:
    """Writes EXIF directories to the end of a little-endian TIFF and lets its placeholders point to them."""
    import tifffile
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    file.seek(0)
    with tifffile.TiffFile(file) as made:
        page: Any = made.pages[0]
        places = {tag: page.tags[_PLACEHOLDERS[tag]] for tag in directories}
        entries = {tag: (place.offset, place.valueoffset) for tag, place in places.items()}
    order: Literal["little", "big"] = "little" if file.getvalue()[:2] == b"II" else "big"
    for tag, values in directories.items():
        end = file.seek(0, io.SEEK_END)
        file.write(b"\0" * (end % 2))
        directory = ImageFileDirectory_v2(b"II*\0\x08\0\0\0" if order == "little" else b"MM\0*\0\0\0\x08", group=tag)
        for key, value in values.items():
            directory[key] = value
        start = file.tell()
        file.write(directory.tobytes(start))
        entry, value_at = entries[tag]
        file.seek(entry)
        file.write(tag.to_bytes(2, order))
        file.seek(value_at)
        file.write(start.to_bytes(4, order))

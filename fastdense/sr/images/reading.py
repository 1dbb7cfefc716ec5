# SPDX-License-Identifier: Apache-2.0
"""The one reader of picture files: upright samples of any type, every frame, and what the file says about them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from fastdense._support import InputError, MissingExtraError, extra
from fastdense.sr.images.formats import READABLE
from fastdense.sr.images.limits import DEFLATE, check_fits
from fastdense.sr.images.metadata import png_colour_chunks, read_metadata
from fastdense.sr.images.picture import CorruptImageError, Picture, channels_of, check_alike, upright
from fastdense.sr.images.png import Header, chunks, read_header
from fastdense.sr.images.tiff import is_tiff, open_tiff, quiet_opencv, read_tiff
from fastdense.sr.samples import alpha_peak, bounded_peak_of, has_alpha, is_opaque, to_depth, without_alpha

if TYPE_CHECKING:
    from PIL import Image

# Text of a PNG may be so long once it is unpacked; Pillow's own limit of 1 MiB refuses whole pictures.
_MOST_TEXT = 2**28
_LOCK = threading.RLock()
# What Pillow calls 32 bits although the formats have 16.
_SHORT_FORMATS = ("PNG", "PPM", "JPEG2000", "SGI")


def read_picture(path: Path, frame: int | None = None) -> Picture:
    """Reads a picture file completely.

    Samples keep their type, alpha and number of frames; they are turned upright by the EXIF orientation. Palettes
    become colours, transparent colours become alpha. CMYK and Lab become sRGB by their profiles.

    Args:
        path: of the file; its content says the format, not its ending.
        frame: the number of one frame, from 1; None reads all.

    Raises:
        CorruptImageError: the file is damaged, may not be read, is no picture, or does not tell what its samples mean.
        InputError: it needs more memory than there is, or has no such frame.
        MissingExtraError: a package that reads it is not installed.
    """
    with _named(path):
        with open(path, "rb") as file:
            start = file.read(26)
        if not is_tiff(start):
            return _read_by_pillow(path, frame, read_header(start))
        with _quiet(), open_tiff(path) as tiff:
            chosen = _chosen(path, tiff.frames, frame)
            tiff.check_channels()
            if tiff.needs_tifffile:
                return read_tiff(tiff, chosen)
            pages = [tiff.pages[at].index for at in chosen]
        return _read_by_pillow(path, None, None, pages)


def read_bytes(path: Path) -> numpy.ndarray:
    """uint8 ``[H, W]`` or ``[H, W, 3]`` of one opaque picture, white for white: what is measured and trained on.

    Raises:
        CorruptImageError: as :func:`read_picture`, and for several frames, alpha, or samples whose white is not known.
    """
    picture = read_picture(path)
    if len(picture.frames) > 1:
        raise CorruptImageError(f"{path}: expected one frame, got {len(picture.frames)}; write one by resize --frame N")
    samples = picture.samples
    if has_alpha(samples):
        if not is_opaque(samples):
            raise CorruptImageError(
                f"{path}: expected an opaque picture, got alpha; write one by resize --flatten COLOUR"
            )
        samples = without_alpha(samples)
    with _named(path):
        return to_depth(samples, 8, bounded_peak_of(samples))


def open_rgb(path: Path) -> Image.Image:
    """Decodes a picture file completely, upright, as RGB without alpha; raises what :func:`read_bytes` does."""
    with extra("cli"):
        from PIL import Image, ImageOps
    with _named(path), _opened(path) as picture:
        if picture.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr") and _frames_of(picture) == 1:
            picture.load()
            return ImageOps.exif_transpose(picture).convert("RGB")
    samples = read_bytes(path)
    return Image.fromarray(samples).convert("RGB")


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Every failure becomes an error that names the file: decoders of damaged files fail in many ways."""
    try:
        yield
    except (InputError, MissingExtraError):
        raise
    except OSError as error:
        unknown = type(error).__name__ == "UnidentifiedImageError"
        reason = "no picture of a known format" if unknown else error.strerror or error
        raise CorruptImageError(f"{path}: {reason}") from error
    except Exception as error:
        raise CorruptImageError(f"{path}: {error or type(error).__name__}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image of Pillow without Pillow's limits: those here look at memory, and know pictures of 200 megapixels."""
    with extra("cli"):
        from PIL import Image, PngImagePlugin
    limits: dict[Any, int | None] = {(Image, "MAX_IMAGE_PIXELS"): None}
    limits |= {(PngImagePlugin, name): _MOST_TEXT for name in ("MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY")}
    with _LOCK, _quiet():
        before = {place: getattr(*place) for place in limits}
        try:
            for (module, name), value in limits.items():
                setattr(module, name, value)
            with Image.open(path, formats=READABLE) as picture:
                _check_claim(path, picture)
                yield picture
        finally:
            for (module, name), value in before.items():
                setattr(module, name, value)


def _check_claim(path: Path, picture: Image.Image) -> None:
    pixels = picture.width * picture.height
    if picture.format == "PNG" and pixels / 8 > DEFLATE * path.stat().st_size:
        raise CorruptImageError(f"{path}: says that it has {picture.width} x {picture.height} pixels; it is too small")
    check_fits(f"{path}: a picture of {picture.width} x {picture.height}", pixels * len(picture.getbands()))


def _frames_of(picture: Image.Image) -> int:
    """The other pictures of an MPO are previews of the first, or its other half for stereo."""
    return 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)


def _chosen(path: Path, frames: int, frame: int | None) -> list[int]:
    if frame is None:
        return list(range(frames))
    if not 1 <= frame <= frames:
        raise InputError(f"{path}: expected --frame from 1 to {frames}, got {frame}")
    return [frame - 1]


def _read_by_pillow(path: Path, frame: int | None, png: Header | None, pages: list[int] | None = None) -> Picture:
    with _opened(path) as picture:
        chosen = _chosen(path, _frames_of(picture), frame) if pages is None else pages
        durations: tuple[float, ...] = ()
        check_fits(f"{path}: {len(chosen)} frames", len(chosen) * picture.width * picture.height * 4)
        if chosen == [0] and _frames_of(picture) == 1:
            decoded = [_decoded(path, picture, png)]
        else:
            decoded, durations = _animated(path, picture, chosen, png)
        metadata, orientation = read_metadata(picture)
        notes = []
        if frame is None and pages is None and getattr(picture, "default_image", False):
            decoded, durations = decoded[1:], durations[1:]
            notes.append("the picture that is shown where it does not move (APNG) is left out")
        if picture.mode in _CONVERTED:
            metadata = dataclasses.replace(metadata, icc=None)
            notes.append(f"its {picture.mode} colours became sRGB")
        if picture.format == "MPO" and getattr(picture, "n_frames", 1) > 1:
            notes.append(f"its {picture.n_frames - 1} previews (MPO) are left out")  # type: ignore[attr-defined]
        if png:
            metadata = dataclasses.replace(metadata, chunks=png_colour_chunks(picture.info))
        if picture.format == "WEBP":
            metadata = dataclasses.replace(metadata, lossless=is_lossless_webp(path.read_bytes()))
        if picture.format == "TIFF":  # Pillow has turned it
            orientation = 1
        loop = picture.info.get("loop") if len(chosen) > 1 else None
    return Picture(tuple(upright(samples, orientation) for samples in decoded), metadata, durations, loop, tuple(notes))


def _animated(
    path: Path, picture: Any, chosen: list[int], png: Header | None
) -> tuple[list[numpy.ndarray], tuple[float, ...]]:
    """Frames, all with the channels of the richest, and how long each is shown."""
    if png and png.depth == 16:
        raise CorruptImageError(f"{path}: expected frames of 8 bits, got 16")
    made, durations = [], []
    for at in chosen:
        picture.seek(at)
        picture.load()
        made.append(_samples(path, picture, png))
        durations.append(float(picture.info.get("duration") or 0))
    check_alike(path, [samples.shape[:2] for samples in made], [samples.dtype for samples in made])
    alpha = any(has_alpha(samples) and not is_opaque(samples) for samples in made)
    made = [without_alpha(samples) if has_alpha(samples) and not alpha else samples for samples in made]
    colours = any(channels_of(samples) >= 3 for samples in made)
    made = [_with_channels(samples, colours, alpha) for samples in made]
    return made, tuple(durations) if len(durations) > 1 and any(durations) else ()


def _with_channels(samples: numpy.ndarray, colours: bool, alpha: bool) -> numpy.ndarray:
    pixels = samples if samples.ndim == 3 else samples[..., None]
    shown, hidden = (pixels[..., :-1], pixels[..., -1:]) if has_alpha(samples) else (pixels, None)
    if colours and shown.shape[2] == 1:
        shown = numpy.repeat(shown, 3, 2)
    if alpha:
        opaque = numpy.full_like(shown[..., :1], alpha_peak(samples.dtype))
        shown = numpy.concatenate([shown, opaque if hidden is None else hidden], 2)
    return shown if shown.shape[2] > 1 else shown[..., 0]


def _decoded(path: Path, picture: Image.Image, png: Header | None) -> numpy.ndarray:
    """The only frame."""
    if png and png.is_deep_colour:
        content = path.read_bytes()
        transparent = any([kind == b"tRNS" for kind, _ in chunks(content)])  # a list: reads to the end
        samples = _by_opencv(path, content)
        if png.colour_type == 4 and samples.ndim == 3 and samples.shape[2] == 4:
            samples = samples[..., [0, 3]]  # OpenCV repeats grey
        if transparent and samples.shape[2] == 3:
            samples = _keyed(samples, picture.info["transparency"])
        return samples
    if picture.format == "PPM" and picture.mode == "RGB" and (most := _ppm_most(path)) > 255:
        samples = _by_opencv(path, path.read_bytes() + b"\n")  # it wants the last line of numbers to end
        return samples if most == 65535 else numpy.floor(samples * (65535 / most) + 0.5).astype(numpy.uint16)
    picture.load()
    return _samples(path, picture, png)


def _ppm_most(path: Path) -> int:
    """The sample that stands for white: the fourth word of a PPM that is no comment."""
    with open(path, "rb") as file:
        words = re.sub(rb"#[^\n]*", b"", file.read(2**16)).split(maxsplit=4)
    if len(words) < 4:
        raise CorruptImageError(f"{path}: expected a header of at most 64 KiB, got a longer one")
    return int(words[3])


def _by_opencv(path: Path, content: bytes) -> numpy.ndarray:
    try:
        with extra("images"):
            import cv2
    except MissingExtraError as error:
        raise CorruptImageError(f"{path}: 16 bits and colours: {error}") from error
    with quiet_opencv():
        samples = cv2.imdecode(numpy.frombuffer(content, numpy.uint8), cv2.IMREAD_UNCHANGED)
    if samples is None or samples.dtype != numpy.uint16:
        raise CorruptImageError(f"{path}: OpenCV cannot decode it")
    return samples[..., [2, 1, 0, 3][: samples.shape[2]]] if samples.ndim == 3 else samples


# Modes whose colours are converted by their profile.
_CONVERTED = ("CMYK", "LAB")


def _samples(path: Path, picture: Image.Image, png: Header | None) -> numpy.ndarray:
    """Of an image that is loaded, in the mode of its own that keeps everything."""
    mode, key = picture.mode, picture.info.get("transparency")
    if mode in _CONVERTED:
        return numpy.asarray(_as_srgb(path, picture))
    if mode == "P" or mode == "PA":
        palette = getattr(picture.palette, "mode", "RGB")
        return numpy.asarray(picture.convert("RGBA" if key is not None or "A" in palette + mode[1:] else "RGB"))
    if mode == "1" or mode == "L":
        shift = 255 // (2**png.depth - 1) if png and mode == "L" and png.depth < 8 and isinstance(key, int) else 1
        return _keyed(numpy.asarray(picture.convert("L")), None if key is None else key * shift)
    if mode.startswith("I;16") or (mode == "I" and picture.format in _SHORT_FORMATS):
        return _keyed(numpy.asarray(picture).astype(numpy.uint16), key)
    if mode == "RGB":
        return _keyed(numpy.asarray(picture), key)
    kept = {"RGBa": "RGBA", "La": "LA", "RGBX": "RGB", "YCbCr": "RGB", "HSV": "RGB"}
    if mode not in ("LA", "RGBA", "I", "F", *kept):
        raise CorruptImageError(f"{path}: expected grey, RGB, CMYK or Lab samples, got Pillow's mode {mode}")
    return numpy.asarray(picture.convert(kept.get(mode, mode)))


def _keyed(samples: numpy.ndarray, key: Any) -> numpy.ndarray:
    """With alpha that hides the colour ``key``, where there is one."""
    if key is None or isinstance(key, bytes):
        return samples
    pixels = samples if samples.ndim == 3 else samples[..., None]
    hidden = (pixels == numpy.array(key)).all(-1, keepdims=True)
    alpha = numpy.where(hidden, 0, numpy.iinfo(samples.dtype).max).astype(samples.dtype)
    return numpy.concatenate([pixels, alpha], 2)


def _as_srgb(path: Path, picture: Image.Image) -> Image.Image:
    """Raises:
    CorruptImageError: CMYK without its profile, for which there is no right colour.
    """
    from PIL import ImageCms

    profile = picture.info.get("icc_profile")
    if picture.mode == "LAB":
        source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    elif profile and profile[16:20] == b"CMYK":
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    else:
        raise CorruptImageError(f"{path}: expected CMYK with its colour profile, got none; convert it to RGB first")
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    made = ImageCms.profileToProfile(picture, source, target, outputMode="RGB")
    assert made is not None  # only in place there is nothing to return
    return made


def is_lossless_webp(content: bytes) -> bool:
    """Whether all samples of a WebP are stored without loss."""
    kinds, at = set(), 12
    while at + 8 <= len(content):
        kind, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        kinds.add(content[at + 24 : at + 28] if kind == b"ANMF" else kind)  # a frame holds a chunk, perhaps alpha first
        at += 8 + size + size % 2
    return b"VP8L" in kinds and not kinds & {b"VP8 ", b"ALPH"}

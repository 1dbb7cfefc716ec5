# SPDX-License-Identifier: Apache-2.0
"""Picture files that are easy to read wrongly, and what each of them means.

They are written by Pillow, tifffile, OpenCV, or byte by byte, never by the code under test.
"""

import dataclasses
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy
import tifffile
from PIL import Image, ImageCms

HEIGHT, WIDTH = 36, 48
_WAVES = 60 + 40 * numpy.sin(numpy.arange(WIDTH) / 5.0) + 3.0 * numpy.arange(HEIGHT)[:, None]
# Neighbours differ little, so that lossy formats hold them; no two corners are alike, so that turning shows.
GREY = _WAVES.astype(numpy.uint8)
RGB = numpy.stack([GREY, GREY[::-1], 250 - GREY], 2)
ALPHA = numpy.linspace(10, 255, WIDTH).astype(numpy.uint8)[None].repeat(HEIGHT, 0)
DEEP = GREY.astype(numpy.uint16) * 257 - 100
DEEP_RGB = RGB.astype(numpy.uint16) * 256 + 77
DEEP_ALPHA = ALPHA.astype(numpy.uint16) * 257
UNIT = (GREY / 255).astype(numpy.float32)
TWO = (GREY // 64).astype(numpy.uint8)  # 0 ... 3


@dataclasses.dataclass(frozen=True)
class Awkward:
    """A file.

    Attributes:
        name: of the file.
        write: makes it.
        means: its frames, upright; empty where nobody can know.
        refused: what is said of it, where it is not read; or not written, in the same format.
        tolerance: of the mean difference after a lossy format.
    """

    name: str
    write: Callable[[Path], Any]
    means: Sequence[numpy.ndarray] = ()
    refused: str = ""
    tolerance: float = 0.0


def stack(*planes: numpy.ndarray) -> numpy.ndarray:
    """Channels of a picture side by side."""
    return numpy.concatenate([plane if plane.ndim == 3 else plane[..., None] for plane in planes], 2)


def turn(samples: numpy.ndarray, orientation: int) -> numpy.ndarray:
    """How samples have to be stored for a viewer to see ``samples``: EXIF 2.32, 4.6.4 A, by row and column of 0th."""
    return {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: numpy.rot90(a),
        7: lambda a: numpy.rot90(a.swapaxes(0, 1), 2),
        8: lambda a: numpy.rot90(a, -1),
    }[orientation](samples)


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path: Path, samples: numpy.ndarray, depth: int, colour_type: int, *before: tuple[bytes, bytes]) -> None:
    """A PNG of any depth and colour type, with chunks in front of the samples."""
    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1)
    if depth == 16:
        packed = rows.astype(">u2").view(numpy.uint8)
    else:
        bits = numpy.unpackbits(rows.astype(numpy.uint8)[..., None], axis=2)[..., 8 - depth :]
        packed = numpy.packbits(bits.reshape(height, -1), axis=1)
    data = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


def oriented(orientation: int, **options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(numpy.ascontiguousarray(turn(RGB, orientation))).save(path, exif=exif, **options)

    return write


def pillow(samples: numpy.ndarray, **options: Any) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(samples).save(path, **options)


def tiff(samples: numpy.ndarray, **options: Any) -> Callable[[Path], Any]:
    return lambda path: tifffile.imwrite(path, samples, **options)


def pnm(samples: numpy.ndarray, most: int) -> Callable[[Path], Any]:
    kind = ">u2" if most > 255 else ">u1"
    header = f"P{6 if samples.ndim == 3 else 5}\n# made by hand\n{samples.shape[1]} {samples.shape[0]}\n{most}\n"
    return lambda path: path.write_bytes(header.encode() + samples.astype(kind).tobytes())


def frames(count: int, **options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        first, *others = [Image.fromarray(RGB[:, :, at % 3]).convert("RGB") for at in range(count)]
        first.save(path, save_all=True, append_images=others, **options)

    return write


FRAMES = [RGB[:, :, [at, at, at]] for at in range(3)]
GREY_FRAMES = [RGB[:, :, at] for at in range(3)]
PALETTE = numpy.array([[255, 0, 0], [0, 200, 0], [10, 20, 30], [250, 250, 200]], numpy.uint8)


def with_text(path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("story", "once upon a time " * 200_000, zip=True)
    Image.fromarray(RGB).save(path, pnginfo=info)


def bomb(path: Path) -> None:
    png(path, GREY[:2], 8, 0)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 60000, 60000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    path.write_bytes(content)


def half(write: Callable[[Path], Any]) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        write(path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])

    return cut


def lab(path: Path) -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    made = ImageCms.applyTransform(Image.fromarray(RGB), to_lab)
    assert made is not None
    made.save(path)


def opencv(samples: numpy.ndarray) -> Callable[[Path], Any]:
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[samples.shape[2] if samples.ndim == 3 else 1]
    stored = samples[..., order] if samples.ndim == 3 else samples
    return lambda path: path.write_bytes(cv2.imencode(path.suffix, stored)[1].tobytes())


def hidden(samples: numpy.ndarray, mask: numpy.ndarray) -> numpy.ndarray:
    """With alpha that is 0 where the mask holds."""
    most = numpy.iinfo(samples.dtype).max
    return stack(samples, numpy.where(mask, 0, most).astype(samples.dtype))


def premultiplied(path: Path) -> None:
    product = (RGB.astype(int) * ALPHA[..., None] + 127) // 255
    tifffile.imwrite(path, stack(product.astype(numpy.uint16) * 257, DEEP_ALPHA), photometric="rgb", extrasamples=[1])


KEY = int(GREY[3, 7])
DEEP_KEY = int(DEEP[3, 7])
SHARP = {"quality": 97, "subsampling": 0}
CMYK = numpy.stack([GREY, 255 - GREY, GREY, GREY // 2], 2)

CASES = [
    # Orientation
    *(Awkward(f"turned{at}.jpg", oriented(at, **SHARP), [RGB], tolerance=2) for at in range(1, 9)),
    Awkward("turned6.png", oriented(6), [RGB]),
    Awkward("turned7.webp", oriented(7, lossless=True), [RGB]),
    Awkward("turned5.tif", oriented(5), [RGB]),
    Awkward("turned8deep.tif", tiff(turn(DEEP, 8).copy(), extratags=[(274, "H", 1, 8, True)]), [DEEP]),
    # Grey
    Awkward("grey.png", pillow(GREY), [GREY]),
    Awkward("black_and_white.png", lambda path: png(path, TWO // 2, 1, 0), [TWO // 2 * 255]),
    Awkward("grey2bits.png", lambda path: png(path, TWO, 2, 0), [TWO * 85]),
    Awkward("grey4bits.png", lambda path: png(path, GREY // 16, 4, 0), [GREY // 16 * 17]),
    Awkward("grey16.png", lambda path: png(path, DEEP, 16, 0), [DEEP]),
    Awkward("grey16.tif", tiff(DEEP), [DEEP]),
    Awkward("grey16big.tif", tiff(DEEP, byteorder=">"), [DEEP]),
    Awkward("grey_i16.tif", pillow(DEEP), [DEEP]),
    Awkward("grey.pgm", pillow(GREY), [GREY]),
    Awkward("grey16.pgm", pnm(DEEP, 65535), [DEEP]),
    Awkward("white_is_zero.tif", tiff(255 - GREY, photometric="miniswhite"), [GREY]),
    Awkward("white_is_zero16.tif", tiff(65535 - DEEP, photometric="miniswhite"), [DEEP]),
    # Other types
    Awkward("signed16.tif", tiff((DEEP.astype(int) - 32768).astype(numpy.int16)), [DEEP.view(numpy.int16) ^ -32768]),
    Awkward("signed32.tif", tiff(DEEP.astype(numpy.int32) * 3), [DEEP.astype(numpy.int32) * 3]),
    Awkward("unsigned32.tif", tiff(DEEP.astype(numpy.uint32) * 60000), [DEEP.astype(numpy.uint32) * 60000]),
    Awkward("float32.tif", tiff(UNIT), [UNIT]),
    Awkward("float32rgb.tif", tiff(stack(UNIT, UNIT[::-1], UNIT), photometric="rgb"), [stack(UNIT, UNIT[::-1], UNIT)]),
    Awkward("float64.tif", tiff(UNIT.astype(numpy.float64)), [UNIT.astype(numpy.float64)]),
    Awkward("float16.tif", tiff(UNIT.astype(numpy.float16)), refused="float64, got float16"),
    Awkward("complex.tif", tiff(UNIT.astype(numpy.complex64)), refused="complex64"),
    # Colours
    Awkward("rgb16.png", opencv(DEEP_RGB), [DEEP_RGB]),
    Awkward("rgb16.tif", tiff(DEEP_RGB, photometric="rgb"), [DEEP_RGB]),
    Awkward("rgb16.ppm", pnm(DEEP_RGB, 65535), [DEEP_RGB]),
    Awkward(
        "rgb10.ppm", pnm(RGB.astype(numpy.uint16) * 4, 1023), [(RGB * (4 * 65535 / 1023) + 0.5).astype(numpy.uint16)]
    ),
    Awkward(
        "in_words16.ppm",
        lambda path: path.write_text(f"P3 {WIDTH} {HEIGHT} 65535 {' '.join(map(str, DEEP_RGB.ravel()))}"),
        [DEEP_RGB],
    ),
    Awkward(
        "much_said.ppm",
        lambda path: path.write_bytes(
            b"P6\n#" + 5000 * b"c" + b"\n%d %d\n65535\n" % (WIDTH, HEIGHT) + DEEP_RGB.astype(">u2").tobytes()
        ),
        [DEEP_RGB],
    ),
    Awkward("planes16.tif", tiff(DEEP_RGB.transpose(2, 0, 1).copy(), photometric="rgb"), [DEEP_RGB]),
    Awkward("lzw16.tif", opencv(DEEP_RGB), [DEEP_RGB]),
    Awkward("palette.png", lambda path: png(path, TWO, 2, 3, (b"PLTE", PALETTE.tobytes())), [PALETTE[TWO]]),
    Awkward("palette.bmp", lambda path: Image.fromarray(PALETTE[TWO]).quantize(8).save(path), [PALETTE[TWO]]),
    Awkward("cmyk.jpg", lambda path: Image.fromarray(CMYK, "CMYK").save(path), refused="CMYK with its colour profile"),
    Awkward("lab.tif", lab, [RGB], tolerance=2.5),
    Awkward(
        "five.tif",
        tiff(numpy.stack([GREY] * 5, 2), photometric="minisblack", planarconfig="contig"),
        refused="whose meaning",
    ),
    # Alpha
    Awkward("rgba.png", pillow(stack(RGB, ALPHA)), [stack(RGB, ALPHA)]),
    Awkward("rgba16.png", opencv(stack(DEEP_RGB, DEEP_ALPHA)), [stack(DEEP_RGB, DEEP_ALPHA)]),
    Awkward("la.png", pillow(stack(GREY, ALPHA)), [stack(GREY, ALPHA)]),
    Awkward("la16.png", lambda path: png(path, stack(DEEP, DEEP_ALPHA), 16, 4), [stack(DEEP, DEEP_ALPHA)]),
    Awkward("la_opaque.png", pillow(stack(GREY, GREY * 0 + 255)), [stack(GREY, GREY * 0 + 255)]),
    Awkward(
        "rgba16.tif",
        tiff(stack(DEEP_RGB, DEEP_ALPHA), photometric="rgb", extrasamples=[2]),
        [stack(DEEP_RGB, DEEP_ALPHA)],
    ),
    Awkward(
        "premultiplied.tif", premultiplied, [stack(RGB.astype(numpy.uint16) * 257, DEEP_ALPHA)], tolerance=0.01 * 65535
    ),
    Awkward("rgba.webp", pillow(stack(RGB, ALPHA), lossless=True, exact=True), [stack(RGB, ALPHA)]),
    Awkward("rgba.tga", pillow(stack(RGB, ALPHA)), [stack(RGB, ALPHA)]),
    Awkward("key_grey.png", pillow(GREY, transparency=KEY), [hidden(GREY, GREY == KEY)]),
    Awkward("key_grey2bits.png", lambda path: png(path, TWO, 2, 0, (b"tRNS", b"\0\1")), [hidden(TWO * 85, TWO == 1)]),
    Awkward(
        "key_grey16.png",
        lambda path: png(path, DEEP, 16, 0, (b"tRNS", struct.pack(">H", DEEP_KEY))),
        [hidden(DEEP, DEEP == DEEP_KEY)],
    ),
    Awkward(
        "key_rgb.png",
        pillow(RGB, transparency=tuple(RGB[3, 7].tolist())),
        [hidden(RGB, (RGB[3, 7] == RGB).all(2))],
    ),
    Awkward(
        "key_rgb16.png",
        lambda path: png(path, DEEP_RGB, 16, 2, (b"tRNS", DEEP_RGB[3, 7].astype(">u2").tobytes())),
        [hidden(DEEP_RGB, (DEEP_RGB[3, 7] == DEEP_RGB).all(2))],
    ),
    Awkward(
        "key_palette.png",
        lambda path: png(path, TWO, 2, 3, (b"PLTE", PALETTE.tobytes()), (b"tRNS", b"\xff\x00\x80")),
        [stack(PALETTE[TWO], numpy.array([255, 0, 128, 255], numpy.uint8)[TWO])],
    ),
    # Frames
    Awkward("frames.png", frames(3, duration=[100, 200, 300]), FRAMES),
    Awkward("frames.webp", frames(3, duration=[100, 200, 300], lossless=True), FRAMES),
    Awkward("frames.gif", frames(3, duration=[100, 200, 300]), FRAMES, tolerance=1),
    Awkward("pages.tif", tiff(numpy.stack(GREY_FRAMES), photometric="minisblack", metadata=None), GREY_FRAMES),
    Awkward(
        "pages16.tif",
        tiff(numpy.stack([DEEP, DEEP[::-1]]), photometric="minisblack", metadata=None),
        [DEEP, DEEP[::-1]],
    ),
    Awkward(
        "stack16.tif",
        tiff(numpy.stack([DEEP, DEEP[::-1]]), photometric="minisblack", contiguous=True),
        [DEEP, DEEP[::-1]],
    ),
    # Names, sizes and content
    Awkward("photo.jfif", pillow(RGB, format="JPEG", **SHARP), [RGB], tolerance=2),
    Awkward("frames.avif", frames(3, duration=100, quality=95, subsampling="4:4:4"), FRAMES, tolerance=3),
    Awkward("photo.avif", pillow(RGB, quality=95, subsampling="4:4:4"), [RGB], tolerance=3),
    Awkward("truevision.tga", pillow(RGB), [RGB]),
    Awkward("UPPER.PNG", pillow(RGB), [RGB]),
    Awkward("漢" * 83 + ".png", pillow(RGB), [RGB]),
    Awkward("megabytes_of_text.png", with_text, [RGB]),
    Awkward(
        "alpha_named.jpg",
        pillow(stack(RGB, ALPHA), format="PNG"),
        [stack(RGB, ALPHA)],
        refused="cannot store the alpha",
    ),
    Awkward("deep_named.jpg", pillow(DEEP, format="PNG"), [DEEP], refused="cannot store the 16 bits"),
    Awkward("bomb.png", bomb, refused="60000 x 60000"),
    Awkward("cut.png", half(pillow(RGB)), refused="cut.png"),
    Awkward("cut16.png", half(opencv(DEEP_RGB)), refused="cut16.png"),
    Awkward("cut.jpg", half(pillow(RGB)), refused="cut.jpg"),
    Awkward("cut.tif", half(tiff(DEEP)), refused="cut.tif"),
    Awkward("text.png", lambda path: path.write_text("hello"), refused="no picture of a known format"),
    Awkward("nothing.png", lambda path: path.touch(), refused="no picture of a known format"),
]

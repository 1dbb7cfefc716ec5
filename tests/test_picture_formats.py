# SPDX-License-Identifier: Apache-2.0
"""What picture files say besides their samples stays, and what a format cannot hold is refused before any work."""

import struct

import numpy
import pytest
import tifffile
from PIL import Image, ImageCms, PngImagePlugin, features

from fastdense.cli import main
from tests.cases.awkward import ALPHA, DEEP, DEEP_RGB, GREY, RGB, UNIT, opencv, stack
from tests.cases.picture_files import info, resize

pytestmark = pytest.mark.usefixtures("folder")


# What formats can hold ------------------------------------------------------------------------------------------------

KINDS = {
    "grey": (GREY, "png"),
    "rgb": (RGB, "png"),
    "rgba": (stack(RGB, ALPHA), "png"),
    "la": (stack(GREY, ALPHA), "png"),
    "grey16": (DEEP, "png"),
    "rgb16": (DEEP_RGB, "png"),
    "float": (UNIT, "tif"),
}
# What of a picture a format cannot hold.
LOST = {
    "png": {"float": "32 bits"},
    "tif": {},
    "webp": {"grey16": "16 bits", "rgb16": "16 bits", "float": "32 bits"},
    "bmp": {"rgba": "alpha", "la": "alpha", "grey16": "16 bits", "rgb16": "16 bits", "float": "32 bits"},
    "ppm": {"rgba": "alpha", "la": "alpha", "float": "32 bits"},
    "pgm": {"rgb": "colours", "rgba": "alpha", "la": "alpha", "rgb16": "colours", "float": "32 bits"},
    "gif": {"rgba": "alpha", "la": "alpha", "grey16": "16 bits", "rgb16": "16 bits", "float": "32 bits"},
    "jpg": {"rgba": "alpha", "la": "alpha", "grey16": "16 bits", "rgb16": "16 bits", "float": "32 bits"},
    "tga": {"grey16": "16 bits", "rgb16": "16 bits", "float": "32 bits"},
}
ADVISED = ("png", "tif", "webp", "bmp", "ppm")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", LOST)
def test_what_a_format_cannot_hold_is_refused_before_it_is_computed(kind, ending, folder, capsys, monkeypatch):
    samples, source = KINDS[kind]
    path = folder / f"in.{source}"
    if source == "tif":
        tifffile.imwrite(path, samples)
    elif samples.dtype == numpy.uint16:
        opencv(samples)(path)
    else:
        Image.fromarray(samples).save(path)
    lost = LOST[ending].get(kind)
    if lost is None:
        assert resize(path.name, f"out.{ending}") == 0
        assert (folder / f"out.{ending}").exists()
        return
    monkeypatch.setattr("fastdense.sr.resize_samples.bicubic_resize", None)  # not called
    assert resize(path.name, f"out.{ending}") == 2
    text = capsys.readouterr().err
    assert f"fastdense: resize: the format of out.{ending} cannot store the {lost} of this picture" in text
    advised = [name for name, refused in LOST.items() if kind not in refused and name in ADVISED]
    assert f"; write {' or '.join(f'.{name}' for name in sorted(advised))}" in text
    assert ("give --depth 8" in text) is lost.endswith("bits")
    assert ("give --flatten COLOUR" in text) is ("la" in kind or "rgba" in kind)
    assert sorted(path.name for path in folder.iterdir()) == [path.name]


def test_flatten_puts_a_colour_behind(folder):
    """Of 100 with an alpha of 51 / 255 = 1 / 5 before 255: 100 / 5 + 255 * 4 / 5 = 224; before 0: 20."""
    Image.fromarray(numpy.full((4, 5, 2), (100, 51), numpy.uint8)).save("la.png")
    assert resize("la.png", "white.bmp", "--flatten", "white") == 0
    assert resize("la.png", "colour.bmp", "--flatten", "#ff0000") == 0
    white, colour = (numpy.asarray(Image.open(name)) for name in ("white.bmp", "colour.bmp"))
    assert white.shape == (4, 5) and (white == 224).all()
    assert (colour == (224, 20, 20)).all()


def test_depth_by_the_users_word(folder):
    """100 * 257 of 65535 is 100 of 255; 0.5 of 1 is 127.5, which rounds up; and back."""
    tifffile.imwrite("deep.tif", numpy.full((4, 5), 25700, numpy.uint16))
    tifffile.imwrite("unit.tif", numpy.full((4, 5), 0.5, numpy.float32))
    Image.fromarray(numpy.full((4, 5), 100, numpy.uint8)).save("bytes.png")
    assert resize("deep.tif", "deep.webp", "--depth", "8") == 0
    assert resize("unit.tif", "unit.png", "--depth", "8") == 0
    assert resize("bytes.png", "deep.png", "--depth", "16") == 0
    assert (numpy.asarray(Image.open("deep.webp").convert("L")) == 100).all()
    assert (numpy.asarray(Image.open("unit.png")) == 128).all()
    assert (numpy.asarray(Image.open("deep.png")) == 25700).all()


def test_numbers_beyond_white_have_no_depth(folder, capsys):
    tifffile.imwrite("hdr.tif", numpy.full((4, 5), 7.5, numpy.float32))
    assert resize("hdr.tif", "out.png", "--depth", "8") == 2
    assert "expected floating-point samples from 0 (black) to 1 (white), got 7.5 to 7.5" in capsys.readouterr().err


@pytest.mark.parametrize(("ending", "longest"), [("gif", 65535), ("jpg", 65500), ("webp", 16383)])
def test_a_side_that_a_format_cannot_hold(ending, longest, capsys):
    Image.fromarray(RGB).save("in.png")
    assert main(["resize", "in.png", f"out.{ending}", "--size", f"{longest + 1}x2"]) == 2
    text = capsys.readouterr().err
    assert f"cannot store the size of this picture ({longest + 1} x 2, RGB, uint8); write .bmp or .png" in text


# What files say -------------------------------------------------------------------------------------------------------

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
KEEPING = ["png", "jpg", "tif", "webp"]


@pytest.mark.parametrize("source", KEEPING)
@pytest.mark.parametrize("target", KEEPING)
@pytest.mark.parametrize("samples", [RGB, DEEP_RGB], ids=["8", "16"])
def test_profile_exif_and_resolution_survive(source, target, samples, folder):
    deep = samples.dtype == numpy.uint16
    if deep and (source != "tif" or target in ("jpg", "webp")):
        return  # Pillow, which writes the file, cannot
    exif = Image.Exif()
    exif[0x0110] = "camera"
    exif.get_ifd(0x8769).update({0xA002: 48, 0xA003: 36, 0x9003: "2024:01:02 03:04:05"})
    path = folder / f"in.{source}"
    if deep:
        tifffile.imwrite(
            path,
            samples,
            photometric="rgb",
            iccprofile=SRGB,
            resolution=(300, 300),
            extratags=[(0x0110, "s", 0, "camera", True)],
        )
    else:
        Image.fromarray(samples).save(path, exif=exif.tobytes(), icc_profile=SRGB, dpi=(300, 300))
    assert main(["resize", path.name, f"out.{target}", "--scale", "2"]) == 0
    said = info(f"out.{target}")
    assert said["icc_profile"] == SRGB
    assert target == "webp" or source == "webp" or round(float(said["dpi"][0])) == 300
    with Image.open(f"out.{target}") as picture:
        found = picture.getexif()
        assert found[0x0110] == "camera"
        if not deep:
            details = found.get_ifd(0x8769)
            assert details[0x9003] == "2024:01:02 03:04:05"
            assert (details[0xA002], details[0xA003]) == (96, 72)  # of the result


def test_thumbnails_are_dropped_and_orientation_is_reset(folder):
    inner = folder / "small.jpg"
    Image.fromarray(RGB[:8, :8]).save(inner)
    thumbnail = inner.read_bytes()
    # Two directories: orientation 6; then where the thumbnail is and how long.
    first = struct.pack("<HHHIII", 1, 0x0112, 3, 1, 6, 26)
    second = struct.pack("<HHHIIHHIII", 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, len(thumbnail), 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + first + second
    exif += b"\0" * (6 + 56 - len(exif)) + thumbnail
    Image.fromarray(RGB).save("in.jpg", exif=exif, quality=95)
    assert thumbnail in (folder / "in.jpg").read_bytes()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(RGB).save("in.webp", exif=exif, xmp=xmp, lossless=True)
    for name in ("in.jpg", "in.webp"):
        assert resize(name, f"out{name[2:]}") == 0
        with Image.open(f"out{name[2:]}") as picture:
            assert picture.size == (36, 48) and picture.getexif().get(0x0112, 1) == 1
        assert thumbnail not in (folder / f"out{name[2:]}").read_bytes()
    assert b'tiff:Orientation="1"' in (folder / "out.webp").read_bytes()


def test_text_survives_from_png_to_png(folder):
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", "somebody")
    text.add_itxt("Title", "Schönes Bild", zip=True)
    Image.fromarray(RGB).save("in.png", pnginfo=text)
    opencv(DEEP_RGB)(folder / "plain16.png")
    assert resize("in.png", "out.png") == 0
    assert resize("in.png", "out16.png", "--depth", "16") == 0
    for name in ("out.png", "out16.png"):
        with Image.open(name) as picture:
            picture.load()
            assert picture.text == {"Author": "somebody", "Title": "Schönes Bild"}


@pytest.mark.parametrize("depth", ["8", "16"])
def test_gamma_and_chromaticity_of_png_survive(depth, folder):
    info_ = PngImagePlugin.PngInfo()
    info_.add(b"gAMA", struct.pack(">I", 100000))
    Image.fromarray(RGB).save("in.png", pnginfo=info_)
    assert resize("in.png", "out.png", "--depth", depth) == 0
    assert info("out.png")["gamma"] == 1.0


def cmyk_profile() -> bytes:
    """An ICC profile (lut8 to Lab) of an ink whose L is 100 (1 - K), whatever the other three are."""
    nodes = b"".join(bytes([0 if at & 1 else 255, 128, 128]) for at in range(16))  # K changes fastest
    ramp = bytes(range(256))
    identity = b"".join(struct.pack(">i", 65536 if at % 4 == 0 else 0) for at in range(9))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + nodes + ramp * 3
    lut += b"\0" * (-len(lut) % 4)
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"inks\0" + b"\0" * 78 + b"\0" * 1
    copyright = b"text\0\0\0\0free\0\0\0\0"
    tags, at, table, body = [(b"A2B0", lut), (b"desc", text), (b"cprt", copyright), (b"wtpt", white)], 180, b"", b""
    for name, data in tags:
        data += b"\0" * (-len(data) % 4)
        table += struct.pack(">4sII", name, at + len(body), len(data))
        body += data
    header = bytearray(128)
    header[4:8], header[8:12], header[12:16] = b"lcms", b"\x02\x40\0\0", b"prtr"
    header[16:20], header[20:24], header[36:40] = b"CMYK", b"Lab ", b"acsp"
    header[68:80] = struct.pack(">3i", 63190, 65536, 54061)
    made = bytes(header) + struct.pack(">I", len(tags)) + table
    made += b"\0" * (at - len(made)) + body
    return struct.pack(">I", len(made)) + made[4:]


def test_inks_become_srgb_by_their_profile(folder, capsys):
    """L of 100, 50.2 and 0: white, (50.2 + 16)^3 / 116^3 = 0.1859 of the light, which sRGB writes as 119; black."""
    inks = numpy.zeros((6, 9, 4), numpy.uint8)
    inks[:, 3:6, 3], inks[:, 6:, 3], inks[..., 0] = 127, 255, 60
    profile = cmyk_profile()
    Image.fromarray(inks, "CMYK").save("in.tif", icc_profile=profile)
    Image.fromarray(inks, "CMYK").save("in.jpg", icc_profile=profile, quality=100)
    for name in ("in.tif", "in.jpg"):
        assert resize(name, "out.png") == 0
        assert "its CMYK colours became sRGB" in capsys.readouterr().out
        made = numpy.asarray(Image.open("out.png")).astype(int)
        assert numpy.abs(made[:, [1, 4, 7]] - numpy.array([255, 119, 0])[None, :, None]).max() <= 3
        assert "icc_profile" not in info("out.png")


def test_a_profile_of_inks_is_not_written_on_rgb(capsys):
    Image.fromarray(RGB).save("in.png", icc_profile=cmyk_profile())
    assert resize("in.png", "out.png") == 0
    assert "its colour profile is left out, since it is for CMYK and the samples are not" in capsys.readouterr().out
    assert "icc_profile" not in info("out.png")


def test_a_profile_that_a_format_has_no_room_for_is_named(capsys):
    Image.fromarray(RGB).save("in.png", icc_profile=SRGB)
    assert resize("in.png", "out.bmp") == 0
    assert "note: in.png: its colour profile is left out, since BMP holds none" in capsys.readouterr().out


def test_a_damaged_profile_is_named(capsys):
    Image.fromarray(RGB).save("in.png", icc_profile=b"nothing")
    assert resize("in.png", "out.png") == 0
    assert "note: in.png: its colour profile is left out, since it is damaged" in capsys.readouterr().out
    assert "icc_profile" not in info("out.png")


def test_what_is_too_long_for_a_jpeg_is_named(capsys):
    """A marker segment has at most 65535 bytes."""
    Image.fromarray(GREY).save("in.gif", comment=b"c" * 65534)
    Image.fromarray(RGB).save("in.webp", xmp=b"x" * 65503)
    assert resize("in.gif", "gif.jpg") == resize("in.webp", "webp.jpg") == 0
    text = capsys.readouterr().out
    assert "its comment is left out, since JPEG holds 65533 bytes of it and it has 65534" in text
    assert "its xmp is left out, since JPEG holds 65502 bytes of it and it has 65503" in text
    assert "comment" not in info("gif.jpg") and "xmp" not in info("webp.jpg")
    Image.fromarray(GREY).save("in.gif", comment=b"c" * 65533)
    assert resize("in.gif", "gif.jpg") == 0 and info("gif.jpg")["comment"] == b"c" * 65533


# Loss -----------------------------------------------------------------------------------------------------------------


def tables(path: str) -> tuple[list[int], object]:
    with Image.open(path) as picture:
        return list(picture.quantization[0]), picture.layer[0][1:3]


@pytest.mark.parametrize(("source", "options", "wanted"), [(60, [], 95), (98, [], 98), (98, ["--quality", "40"], 40)])
def test_jpeg_keeps_the_larger_quality_and_all_colour(source, options, wanted):
    Image.fromarray(RGB).save("in.jpg", quality=source)
    Image.fromarray(RGB).save("wanted.jpg", quality=wanted, subsampling=0)
    assert resize("in.jpg", "out.jpg", *options) == 0
    assert tables("out.jpg") == tables("wanted.jpg") and tables("out.jpg")[1] == (1, 1)


def test_webp_keeps_its_kind(folder):
    Image.fromarray(RGB).save("lossless.webp", lossless=True)
    Image.fromarray(RGB).save("lossy.webp", quality=60)
    for name, kind in (("lossless", b"VP8L"), ("lossy", b"VP8 ")):
        assert resize(f"{name}.webp", f"{name}_out.webp") == 0
        assert kind in (folder / f"{name}_out.webp").read_bytes()[:40]
    assert resize("lossy.webp", "small.webp", "--quality", "10") == 0
    assert (folder / "small.webp").stat().st_size < (folder / "lossy_out.webp").stat().st_size / 2


def test_quality_is_of_lossy_formats(capsys):
    Image.fromarray(RGB).save("in.png")
    assert resize("in.png", "out.png", "--quality", "90") == 2
    assert "expected --quality with OUT that ends in .avif, .jfif, .jpeg, .jpg, .webp" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "101", "best"])
def test_quality_is_a_number(text, capsys):
    with pytest.raises(SystemExit):
        resize("in.png", "out.jpg", "--quality", text)
    assert "expected a quality from 1 to 100" in capsys.readouterr().err


def test_help_says_what_is_lost(capsys):
    for command in ("resize", "upscale"):
        with pytest.raises(SystemExit):
            main([command, "-h"])
        text = " ".join(capsys.readouterr().out.split())
        assert "it is written at 95 and halves colour" in text
        assert "--alpha {premultiplied,straight}" in text


def test_own_results_of_200_megapixels_are_read_again(folder):
    Image.new("1", (20000, 10000)).save("large.png")
    assert main(["resize", "large.png", "small.png", "--size", "20x10", "--preset", "pillow"]) == 0
    assert Image.open("small.png").size == (20, 10)


def test_pillow_writes_avif():
    """The test environment's does; where it does not, ``resize`` says so: below."""
    assert features.check("avif")


def test_a_pillow_without_avif_says_so(monkeypatch, capsys):
    Image.fromarray(RGB).save("in.png")
    monkeypatch.setattr(features, "check", lambda _: False)
    assert resize("in.png", "out.avif") == 2
    assert "expected a Pillow that writes AVIF for out.avif" in capsys.readouterr().err

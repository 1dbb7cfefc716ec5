# SPDX-License-Identifier: Apache-2.0
"""Animations and files of several pages: all frames with their durations, or an error."""

import numpy
import pytest
import tifffile
from PIL import Image

from fastdense.cli import main
from tests.cases.awkward import DEEP, GREY, RGB, UNIT, frames
from tests.cases.picture_files import resize

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize("source", ["gif", "png", "webp", "avif"])
@pytest.mark.parametrize("target", ["gif", "png", "webp", "avif"])
def test_frames_keep_their_durations(source, target, folder):
    lossless = {"lossless": True} if source == "webp" else {}
    frames(3, duration=[100, 250, 400], loop=2, **lossless)(folder / f"in.{source}")
    assert main(["resize", f"in.{source}", f"out.{target}", "--scale", "2"]) == 0
    with Image.open(f"out.{target}") as made:
        assert (made.n_frames, made.size) == (3, (96, 72))
        durations = []
        for at in range(3):
            made.seek(at)
            made.load()
            durations.append(made.info["duration"])
            centre = numpy.asarray(made.convert("RGB"))[20:50, 20:70].astype(int)
            wanted = RGB[10:25, 10:35, at].repeat(2, 0).repeat(2, 1)[..., None]
            assert numpy.abs(centre - wanted).mean() < 8
    assert durations == [100, 250, 400]


def test_one_frame_by_the_users_word(folder):
    frames(3, duration=100)(folder / "in.gif")
    tifffile.imwrite("in.tif", numpy.stack([DEEP, DEEP[::-1]]), photometric="minisblack", metadata=None)
    assert resize("in.gif", "out.png", "--frame", "2") == 0
    assert resize("in.tif", "deep.png", "--frame", "2") == 0
    assert numpy.array_equal(numpy.asarray(Image.open("out.png").convert("L")), RGB[..., 1])
    assert numpy.array_equal(numpy.asarray(Image.open("deep.png")), DEEP[::-1])


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        ("out.jpg", [], "cannot store the 3 frames of this picture (48 x 36, RGB, uint8, 3 frames)"),
        ("out.jpg", [], "give --frame N (1 to 3)"),
        ("out.png", ["--frame", "4"], "in.gif: expected --frame from 1 to 3, got 4"),
        ("out.png", ["--frame", "0"], "in.gif: expected --frame from 1 to 3, got 0"),
    ],
)
def test_frames_are_never_dropped_in_silence(write, options, message, folder, capsys):
    frames(3, duration=100)(folder / "in.gif")
    assert resize("in.gif", write, *options) == 2
    assert message in capsys.readouterr().err and not (folder / write).exists()


@pytest.mark.parametrize(("first", "second"), [(DEEP, DEEP[:20]), (DEEP, UNIT), (RGB, GREY[:20]), (GREY, UNIT)])
def test_frames_that_are_not_alike_are_named(first, second, capsys):
    """White of one would be black of the other."""
    for at, samples in enumerate((first, second)):
        tifffile.imwrite("in.tif", samples, append=at > 0)
    assert resize("in.tif", "out.tif") == 2
    text = capsys.readouterr().err
    assert "in.tif: expected frames of one size and type, got 2 of 48 x 36 " in text
    assert "; give --frame N (1 to 2)" in text
    assert resize("in.tif", "out.tif", "--frame", "2") == 0
    assert numpy.array_equal(tifffile.imread("out.tif"), second)


def test_a_picture_beside_the_animation_is_no_frame_of_it(capsys):
    """What programs show that know no APNG."""
    still, *moving = [Image.fromarray(RGB[..., at]) for at in range(3)]
    still.save("in.png", save_all=True, append_images=moving, default_image=True, duration=[100, 250])
    assert resize("in.png", "out.png") == 0
    assert (
        "note: in.png: the picture that is shown where it does not move (APNG) is left out" in capsys.readouterr().out
    )
    with Image.open("out.png") as made:
        assert made.n_frames == 2 and not made.default_image
        for at in range(2):
            made.seek(at)
            assert made.info["duration"] == [100, 250][at]
            assert numpy.array_equal(numpy.asarray(made.convert("L")), RGB[..., 1 + at])
    assert resize("in.png", "still.png", "--frame", "1") == 0
    assert numpy.array_equal(numpy.asarray(Image.open("still.png").convert("L")), RGB[..., 0])

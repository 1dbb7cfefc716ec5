# SPDX-License-Identifier: Apache-2.0
"""A folder of awkward picture files goes through all commands: each comes out right, or is refused by name."""

import json
import re
from pathlib import Path
from unittest import mock

import cv2
import numpy
import pytest
import tifffile
import torch
from PIL import Image, ImageOps, ImageSequence

from fastdense import models, reference
from fastdense.cli import main
from fastdense.models import save_super_resolution
from fastdense.sr.quality import evaluate_image
from fastdense.train.super_resolution import load_pictures
from tests.cases.awkward import CASES, HEIGHT, RGB, WIDTH, Awkward

# Integers that do not tell which of them is white.
UNKNOWN_WHITE = ("signed16.tif", "signed32.tif", "unsigned32.tif")
BY_NAME = {case.name: case for case in CASES}
WRITTEN = [case for case in CASES if not case.refused]
REFUSED = [case for case in CASES if case.refused]


@pytest.fixture(scope="module")
def awkward(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("awkward") / "in"
    folder.mkdir()
    for case in CASES:
        case.write(folder / case.name)
    return folder


def decode(path: Path) -> list[numpy.ndarray]:
    """Frames of a result, by other readers than those under test where there are any."""
    if path.suffix == ".tif":
        with tifffile.TiffFile(path) as file:
            return [page.asarray() for page in file.pages]
    with mock.patch("PIL.PngImagePlugin.MAX_TEXT_CHUNK", 2**26), Image.open(path) as picture:
        assert picture.getexif().get(0x0112, 1) == 1
        if getattr(picture, "n_frames", 1) > 1:
            return [numpy.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)]
        if path.suffix.lower() not in (".png", ".pgm", ".ppm"):
            return [numpy.asarray(picture)]
    samples = cv2.imdecode(numpy.frombuffer(path.read_bytes(), numpy.uint8), cv2.IMREAD_UNCHANGED)
    assert samples is not None
    return [samples[..., [2, 1, 0, 3][: samples.shape[2]]] if samples.ndim == 3 else samples]


def assert_holds(path: Path, expected: list[numpy.ndarray], tolerance: float) -> None:
    made = decode(path)
    assert len(made) == len(expected), path
    for samples, wanted in zip(made, expected, strict=True):
        if wanted.ndim == 3 and wanted.shape[2] == 2 and samples.shape[2] == 4:
            samples = samples[..., [0, 3]]  # OpenCV shows grey with alpha as colours
        assert samples.shape == wanted.shape and samples.dtype == wanted.dtype, path
        difference = numpy.abs(samples.astype(numpy.float64) - wanted)
        assert difference.mean() <= tolerance if tolerance else not difference.any(), (path, difference.max())


def said_of(name: str, text: str) -> str:
    """The line that says why a picture was skipped."""
    lines = [line for line in text.splitlines() if line.startswith("skipped ") and re.search(f"[ /]{name}: ", line)]
    assert len(lines) == 1, (name, text)
    return lines[0]


def test_the_cases_are_what_they_say(awkward):
    """Orientation as Pillow applies it."""
    assert len(CASES) >= 60 and len(BY_NAME) == len(CASES)
    for at in range(1, 9):
        with Image.open(awkward / f"turned{at}.jpg") as picture:
            upright = numpy.asarray(ImageOps.exif_transpose(picture)).astype(int)
        assert numpy.abs(upright - RGB).mean() < 2


def test_resize(awkward, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["resize", str(awkward), str(out), "--scale", "1"]) == 1
    text = capsys.readouterr().out
    for case in WRITTEN:
        assert_holds(out / case.name, list(case.means), case.tolerance)
    for case in REFUSED:
        assert case.refused in said_of(case.name, text)
    assert sorted(path.name for path in out.iterdir()) == sorted(case.name for case in WRITTEN)
    assert f"resized {len(WRITTEN)} of {len(CASES)} pictures into {out}" in text


def by_matlab(samples: numpy.ndarray) -> numpy.ndarray:
    """Twice as large; integers are rounded once, bytes after each axis."""
    planes = torch.from_numpy(samples.astype(numpy.float64).reshape(HEIGHT, WIDTH, -1)).permute(2, 0, 1)[None]
    for size, step in (([2 * HEIGHT, WIDTH], [0.5, 1.0]), ([2 * HEIGHT, 2 * WIDTH], [1.0, 0.5])):
        planes = reference.bicubic(planes, size, step, -0.5, True, "symmetric", False)
        if samples.dtype == numpy.uint8 or (numpy.issubdtype(samples.dtype, numpy.integer) and size[1] > WIDTH):
            limits = numpy.iinfo(samples.dtype)
            planes = (planes.clamp(limits.min, limits.max) + 0.5).floor()
    return planes[0].permute(1, 2, 0).numpy().reshape(2 * HEIGHT, 2 * WIDTH, *samples.shape[2:])


def test_upscale_by_bicubic(awkward, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["upscale", str(awkward), str(out), "--scale", "2"]) == 1
    text = capsys.readouterr().out
    for case in WRITTEN:
        assert (out / case.name).exists(), said_of(case.name, text)
        for samples, meant in zip(decode(out / case.name), case.means, strict=True):
            wanted = by_matlab(meant)
            if meant.ndim == 3 and meant.shape[2] == 2 and samples.shape[2] == 4:
                samples = samples[..., [0, 3]]
            difference = numpy.abs(samples - wanted)
            most = 1e-6 if numpy.issubdtype(meant.dtype, numpy.floating) else 0.0
            assert samples.dtype == meant.dtype and samples.shape == wanted.shape
            assert difference.mean() <= case.tolerance if case.tolerance else difference.max() <= most, case.name
    for case in REFUSED:
        assert case.refused in said_of(case.name, text)
    assert len(list(out.iterdir())) == len(WRITTEN)


def nearest_network() -> models.EDSR:
    """Repeats every pixel: identities, and a pixel shuffle of four copies."""
    net = models.EDSR(2, 1, 3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        for at in range(3):
            net.conv_first.weight[at, at, 1, 1] = net.conv_last.weight[at, at, 1, 1] = 1
            net.upsample[0].weight[4 * at : 4 * at + 4, at, 1, 1] = 1
    return net


def test_upscale_by_a_network(awkward, tmp_path, capsys):
    out, model = tmp_path / "out", tmp_path / "net.pt"
    save_super_resolution(nearest_network(), model)
    assert main(["upscale", str(awkward), str(out), "--model", str(model)]) == 1
    text = capsys.readouterr().out
    for case in WRITTEN:
        if case.name in UNKNOWN_WHITE:
            assert "expected samples whose white is known" in said_of(case.name, text)
            continue
        assert (out / case.name).exists(), said_of(case.name, text)
        for samples, meant in zip(decode(out / case.name), case.means, strict=True):
            wanted = meant.repeat(2, 0).repeat(2, 1)
            if meant.ndim == 3 and meant.shape[2] in (2, 4):  # hidden colours do not come out
                samples = samples[..., [0, 3]] if meant.shape[2] == 2 and samples.shape[2] == 4 else samples
                wanted = numpy.where(wanted[..., -1:] == 0, 0, wanted)
            difference = numpy.abs(samples.astype(numpy.float64) - wanted)
            most = 1e-6 if numpy.issubdtype(meant.dtype, numpy.floating) else 0.0
            assert samples.dtype == meant.dtype and samples.shape == wanted.shape
            assert difference.mean() <= case.tolerance if case.tolerance else difference.max() <= most, case.name
    for case in REFUSED:
        assert case.refused in said_of(case.name, text)
    assert len(list(out.iterdir())) == len(WRITTEN) - len(UNKNOWN_WHITE)


def measured(case: Awkward) -> numpy.ndarray | None:
    """What is measured and trained on: bytes of an opaque picture, or None."""
    if len(case.means) != 1 or case.name in UNKNOWN_WHITE:
        return None
    samples = case.means[0]
    most = numpy.iinfo(samples.dtype).max if numpy.issubdtype(samples.dtype, numpy.integer) else 1
    if samples.ndim == 3 and samples.shape[2] in (2, 4):
        if samples[..., -1].min() < most:
            return None
        samples = samples[..., 0] if samples.shape[2] == 2 else samples[..., :-1]
    return numpy.floor(samples / most * 255 + 0.5).astype(numpy.uint8)


def reason(case: Awkward) -> str:
    """Why a picture is not measured."""
    if not case.means:
        return case.refused
    if len(case.means) > 1:
        return f"expected one frame, got {len(case.means)}"
    return "white is known" if case.name in UNKNOWN_WHITE else "expected an opaque picture, got alpha"


def test_evaluate(awkward, tmp_path, capsys):
    numbers = tmp_path / "numbers.json"
    assert main(["evaluate", "--data", str(awkward), "--scale", "2", "--json", str(numbers)]) == 1
    rows, text = json.loads(numbers.read_text())["pictures"], capsys.readouterr().out
    for case in CASES:
        samples = measured(case)
        if samples is None:
            assert reason(case) in said_of(case.name, text) and case.name not in rows
            continue
        wanted = evaluate_image(samples, 2)[0]
        off = 8.0 if case.tolerance else 1e-9  # decibels: the loss of a lossy file
        assert rows[case.name]["bicubic_psnr"] == pytest.approx(wanted.bicubic_psnr, abs=off), case.name
    assert len(rows) == sum(measured(case) is not None for case in CASES)


def test_train(awkward, tmp_path, capsys):
    training, testing, skipped = load_pictures(str(awkward))
    for at, name in enumerate(sorted(BY_NAME)):
        case, taken = BY_NAME[name], testing if at % 5 == 4 else training
        wanted = measured(case)
        if wanted is None:
            (line,) = [line for line in skipped if f"/{name}: " in line]
            assert reason(case) in line
            continue
        picture = taken.pop(0)
        assert picture.shape == wanted.shape
        difference = numpy.abs(picture.astype(int) - wanted)
        assert difference.mean() <= case.tolerance if case.tolerance else not difference.any(), name
    assert not training and not testing
    options = ["--task", "sr", "--data", str(awkward), "--steps", "1", "--batch", "2", "--size", "8", "--threads", "1"]
    assert main(["train", *options, "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert all(reason(case) in said_of(case.name, text) for case in CASES if measured(case) is None)

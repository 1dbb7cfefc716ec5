# SPDX-License-Identifier: Apache-2.0
"""Alpha and the colours behind it, and numbers that are not finite."""

import numpy
import pytest
import tifffile
import torch
from PIL import Image

from fastdense import models
from fastdense.cli import main
from fastdense.models import save_super_resolution
from tests.cases.awkward import RGB, UNIT

pytestmark = pytest.mark.usefixtures("folder")


def test_alpha_is_resampled_as_pillow_does_it():
    samples = numpy.random.default_rng(0).integers(0, 256, (30, 41, 4), numpy.uint8)
    samples[:, :20, 3] = numpy.where(samples[:, :20, 3] > 128, 255, 0)
    Image.fromarray(samples).save("in.png")
    for size in ((17, 50), (90, 12)):
        assert main(["resize", "in.png", "out.png", "--size", f"{size[1]}x{size[0]}", "--preset", "pillow"]) == 0
        wanted = Image.fromarray(samples).resize(size[::-1], Image.Resampling.BICUBIC)
        assert numpy.array_equal(numpy.asarray(Image.open("out.png")), numpy.asarray(wanted))


def edge() -> numpy.ndarray:
    """White that is seen, next to black that is hidden."""
    samples = numpy.zeros((16, 24, 4), numpy.uint8)
    samples[:, :12] = 255
    return samples


@pytest.mark.parametrize("preset", ["pillow", "matlab", "torch_antialias", "opencv"])
@pytest.mark.parametrize("alpha", ["premultiplied", "straight"])
def test_hidden_colours_do_not_bleed(preset, alpha):
    Image.fromarray(edge()).save("in.png")
    assert main(["resize", "in.png", "out.png", "--scale", "3", "--preset", preset, "--alpha", alpha]) == 0
    made = numpy.asarray(Image.open("out.png")).astype(int)
    seen = made[..., 3] > 0
    assert ((made[seen][:, :3] >= 254).all()) == (alpha == "premultiplied")
    assert (made[..., 3] > 0).any() and (made[..., 3] < 255).any()


def smoothing_network() -> models.EDSR:
    """The mean of three by three pixels, each twice as large."""
    net = models.EDSR(2, 1, 3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        for at in range(3):
            net.conv_first.weight[at, at] = 1 / 9
            net.conv_last.weight[at, at, 1, 1] = 1
            net.upsample[0].weight[4 * at : 4 * at + 4, at, 1, 1] = 1
    return net


@pytest.mark.parametrize("alpha", ["premultiplied", "straight"])
def test_hidden_colours_do_not_bleed_through_a_network(alpha):
    """Behind the edge alpha is 2/3 and 1/3; the colours there stay white, or are as much darker."""
    Image.fromarray(edge()).save("in.png")
    save_super_resolution(smoothing_network(), "net.pt")
    assert main(["upscale", "in.png", "out.png", "--model", "net.pt", "--alpha", alpha]) == 0
    made = numpy.asarray(Image.open("out.png"))[4:-4, 4:-4].astype(int)
    row = made[0]
    if alpha == "premultiplied":
        assert row[16:24, 3].tolist() == [255, 255, 170, 170, 85, 85, 0, 0]
        assert row[16:24, 0].tolist() == [255] * 6 + [0, 0]
    else:
        assert row[16:24, 0].tolist() == [255, 255, 170, 170, 85, 85, 0, 0]


@pytest.mark.parametrize("value", [numpy.nan, numpy.inf])
@pytest.mark.parametrize("command", [["resize"], ["upscale"], ["upscale", "--model", "net.pt"]])
def test_numbers_that_are_not_finite_are_refused(value, command, folder, capsys):
    samples = UNIT.copy()
    samples[3, 4] = value
    tifffile.imwrite("in.tif", samples)
    save_super_resolution(smoothing_network(), "net.pt")
    name, *options = command
    options += [] if "--model" in options else ["--scale", "2"]
    assert main([name, "in.tif", "out.tif", *options]) == 2
    text = capsys.readouterr().err
    assert "in.tif" in text and "NaN or infinity in float32" in text and not (folder / "out.tif").exists()


def test_a_network_that_overflows_in_16_bits_is_no_black_picture(folder, capsys):
    net = smoothing_network()
    with torch.no_grad():
        net.conv_first.weight.mul_(1e4)
        net.conv_last.weight.mul_(1e-4)
    save_super_resolution(net, "net.pt")
    Image.fromarray(RGB).save("in.png")
    assert main(["upscale", "in.png", "out.png", "--model", "net.pt", "--dtype", "float16"]) == 2
    text = capsys.readouterr().err
    assert "in.png" in text and "NaN or infinity in torch.float16; try another --dtype, such as float32" in text
    assert not (folder / "out.png").exists()
    assert main(["upscale", "in.png", "out.png", "--model", "net.pt"]) == 0

# SPDX-License-Identifier: Apache-2.0
"""PSNR, SSIM and luminance against published figures and scikit-image; the commands that use them."""

import json
import math
from pathlib import Path

import cv2
import numpy
import pytest
import skimage
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fastdense import models
from fastdense.cli import main
from fastdense.models import save_super_resolution
from fastdense.ops import bicubic_resize
from fastdense.sr.quality import evaluate_image, luminance, psnr, rgb_to_ycbcr, ssim, ycbcr_to_rgb
from fastdense.sr.upscale_samples import upscale_samples

DATA = Path(skimage.__file__).parent / "data"


def photograph(name: str) -> numpy.ndarray:
    return numpy.asarray(Image.open(DATA / f"{name}.png"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("astronaut", (31.702, 28.681, 26.844)),
        ("coffee", (30.586, 28.401, 27.288)),
        ("chelsea", (35.239, 32.876, 31.466)),
        ("camera", (29.898, 27.674, 26.171)),
        ("motorcycle_left", (30.081, 27.068, 25.357)),
    ],
)
def test_bicubic_baseline(name, expected):
    made = [evaluate_image(photograph(name), scale)[0].bicubic_psnr for scale in (2, 3, 4)]
    assert made == pytest.approx(expected, abs=0.001)


def test_psnr_and_ssim_are_those_of_scikit_image():
    x, y = luminance(photograph("coffee")), luminance(photograph("coffee")[:, ::-1].copy())
    a, b = (t[0, 0, 3:-3, 3:-3].numpy() for t in (x, y))
    assert psnr(x, y, 3) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-10)
    options = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "full": True}
    assert ssim(x, y, 3) == pytest.approx(structural_similarity(a, b, **options)[1][5:-5, 5:-5].mean(), abs=1e-10)
    assert psnr(x, x, 3) == math.inf and ssim(x, x, 3) == pytest.approx(1)
    assert math.isnan(psnr(x * math.nan, x, 3)) and math.isnan(ssim(x * math.nan, x, 3))


def test_luminance_is_that_of_matlab():
    colours = [[[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]]]
    expected = [235, 16, 81, 145, 41, 126]
    assert luminance(numpy.array(colours, numpy.uint8)).flatten().tolist() == expected
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(ycbcr_to_rgb(rgb_to_ycbcr(x)), x)


class Nearest(models.SuperResolutionNet):
    """Repeats every pixel."""

    halo = 0

    def __init__(self, colours, scale=2):
        super().__init__()
        self.colours, self.scale, self.tail_scale = colours, scale, scale
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def live_values(self):
        return 1, self.scale**2

    def tail(self, x):
        return x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("name", ["chelsea", "camera"])
def test_a_network_is_compared_by_its_8_bit_input_and_output(colours, name):
    picture = photograph(name)[:201, :151]
    quality, _, made = evaluate_image(picture, 2, Nearest(colours))
    picture = picture[:200, :150]
    planes = torch.from_numpy(picture.copy())[None, None] if picture.ndim == 2 else luminance(picture)
    if colours == 3 and picture.ndim == 3:
        planes = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]
    small = bicubic_resize(planes.to(torch.uint8), scale_factor=0.5, preset="matlab")
    large = small[0].permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
    expected = luminance(large if large.shape[2] == 3 else large[..., 0])
    assert torch.equal(made, expected)
    assert quality.psnr == psnr(made, luminance(picture), 2)


def test_errors_of_evaluation():
    with pytest.raises(ValueError, match="evaluate: expected scale to be 2 like the network's, got 3"):
        evaluate_image(photograph("camera"), 3, Nearest(1))
    with pytest.raises(ValueError, match="evaluate: expected a picture of 16 pixels or more, got 15 x 50"):
        evaluate_image(photograph("camera")[:50, :15], 2)
    for scale, least in ((2, 16), (3, 18), (4, 20), (8, 32)):  # 11 and twice the scale, to a multiple of it
        assert evaluate_image(photograph("camera")[:least, :least], scale)[0].bicubic_psnr > 0
        with pytest.raises(ValueError, match=f"of {least} pixels or more, got {least} x {least - 1}"):
            evaluate_image(photograph("camera")[: least - 1, :least], scale)


# Samples of all kinds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [numpy.uint8, numpy.uint16, numpy.float32])
@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("colours", [1, 3])
def test_samples_keep_channels_and_depth(dtype, channels, colours):
    peak = 1 if dtype == numpy.float32 else numpy.iinfo(dtype).max
    shape = (5, 4) if channels is None else (5, 4, channels)
    samples = (numpy.random.default_rng(0).random(shape) * peak).astype(dtype)
    made = upscale_samples(samples, Nearest(colours))
    assert made.dtype == dtype and made.shape == (10, 8, *shape[2:])
    expected = samples.repeat(2, 0).repeat(2, 1).astype(numpy.float64)
    known = {None: slice(None), 1: 0, 2: 0, 3: slice(0, 3), 4: slice(0, 3)}[channels]
    if channels in (2, 4):  # what is hidden is black
        expected[..., :-1] *= expected[..., -1:] > 0
    if colours == 1 and channels in (3, 4):  # so is chroma
        made_y, expected_y = (
            rgb_to_ycbcr(torch.from_numpy(v[..., :3] / peak).permute(2, 0, 1)[None])[0, 0] for v in (made, expected)
        )
        interior = torch.from_numpy((made[..., :3] > 0).all(-1) & (made[..., :3] < peak).all(-1))
        assert (made_y - expected_y).abs()[interior].max() < 0.01
    else:
        assert numpy.abs(made.astype(numpy.float64) - expected)[..., known].max() <= peak * 1e-6 + 1e-6


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a picture and a network."""
    monkeypatch.chdir(tmp_path)
    arguments = {"scale": 4, "blocks": 1, "width": 4, "growth_rate": 2}
    save_super_resolution(models.RRDBNet(**arguments), "net.pt")
    Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=numpy.uint8)).save("in.png")
    return tmp_path


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16", "P"])
def test_upscale_keeps_the_kind_of_picture(mode, folder, capsys):
    picture = Image.open("in.png")
    if mode == "I;16":
        picture = Image.fromarray(numpy.asarray(picture.convert("L")).astype(numpy.uint16) * 257)
    picture.convert(mode).save("kind.png") if mode != "I;16" else picture.save("kind.png")
    assert main(["upscale", "kind.png", "out.png", "--model", "net.pt", "--max-memory", "1M"]) == 0
    out = Image.open("out.png")
    assert out.size == (36, 28) and out.mode == ("RGB" if mode == "P" else mode)
    assert "upscaled 1 of 1" in capsys.readouterr().out


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bits_and_colours_stay(channels, folder):
    samples = numpy.random.default_rng(0).integers(0, 65536, (6, 5, channels), dtype=numpy.uint16)
    cv2.imwrite("deep.png", samples)
    assert main(["upscale", "deep.png", "out.png", "--scale", "2"]) == 0
    made = cv2.imread("out.png", cv2.IMREAD_UNCHANGED)
    planes = torch.from_numpy(samples.astype(numpy.float64)).permute(2, 0, 1)[None]
    expected = bicubic_resize(planes, scale_factor=2, preset="matlab").clamp(0, 65535)[0].permute(1, 2, 0)
    assert made.dtype == numpy.uint16 and numpy.abs(made - expected.numpy()).max() <= 0.5


def test_upscale_without_a_model_is_matlabs_bicubic(folder):
    assert main(["upscale", "in.png", "a.png", "--scale", "3"]) == 0
    assert main(["resize", "in.png", "b.png", "--scale", "3", "--preset", "matlab"]) == 0
    assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()


def write_bomb(path):
    """A PNG that promises four thousand million pixels."""
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 65535, 65535, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0" * 50
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["in.png", "out.png"], "upscale: expected --model or --scale to be given, got neither"),
        (
            ["in.png", "out.png", "--model", "net.pt", "--scale", "2"],
            "expected scale to be 4 like the network's, got 2",
        ),
        (["in.png", "out.png", "--model", "absent.pth"], "expected --model to be a file or realesrgan-x4plus"),
        (["in.png", "out.png", "--model", "in.png"], "to be a whole checkpoint of tensors"),
        (["in.png", "out.png", "--model", "net.pt", "--max-memory", "1K"], "expected max_memory to be at least"),
        (["missing.png", "out.png", "--scale", "2"], "upscale: expected IN to be a picture or a folder, got missing"),
        (["net.pt", "out.png", "--scale", "2"], "upscale: cannot read IN: net.pt"),
        (["bomb.png", "out.png", "--scale", "2"], "upscale: cannot read IN: bomb.png"),
        (["empty.png", "out.png", "--scale", "2"], "upscale: cannot read IN: empty.png"),
        (["in.png", "out.txt", "--scale", "2"], "upscale: expected OUT to end in"),
        (["in.png", "in.png/out.png", "--scale", "2"], "upscale: expected OUT to be a file that can be written"),
        (
            ["rgba.png", "out.jpg", "--scale", "2"],
            "the format of out.jpg cannot store the alpha of this picture",
        ),
    ],
)
def test_upscale_refuses_bad_input(options, message, folder, capsys):
    write_bomb(folder / "bomb.png")
    (folder / "empty.png").touch()
    Image.open("in.png").convert("RGBA").save("rgba.png")
    before = sorted(path.name for path in folder.iterdir())
    assert main(["upscale", *options]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_failed_run_leaves_the_old_picture(folder, monkeypatch):
    (folder / "out.png").write_bytes(b"old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdense._support.os.replace", interrupted)
    assert main(["upscale", "in.png", "out.png", "--scale", "2"]) == 130
    assert (folder / "out.png").read_bytes() == b"old"


@pytest.mark.parametrize("text", ["2X", "0", "G", "-1M"])
def test_sizes_in_bytes(text, folder, capsys):
    with pytest.raises(SystemExit):
        main(["upscale", "in.png", "out.png", f"--max-memory={text}"])
    assert "expected a size like 500M or 2G" in capsys.readouterr().err


def test_evaluate_writes_table_numbers_and_picture(folder, capsys):
    (folder / "data").mkdir()
    Image.fromarray(photograph("chelsea")).save("data/cat.png")
    (folder / "data" / "corrupt.png").write_bytes(b"nothing")
    options = ["--data", "data", "--model", "net.pt", "--json", "out.json", "--picture", "side.png"]
    assert main(["evaluate", *options]) == 1
    text = capsys.readouterr().out
    assert "31.466" in text and "skipped corrupt.png" in text
    numbers = json.loads((folder / "out.json").read_text())
    assert numbers["scale"] == 4 and numbers["pictures"]["cat.png"]["bicubic_psnr"] == pytest.approx(31.466, abs=1e-3)
    assert Image.open("side.png").size == (3 * 448, 300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "missing"], "evaluate: expected --data to be 'photographs' or a folder, got missing"),
        (["--data", "."], "evaluate: expected --data to hold pictures that can be used, got none; in.png"),
        (["--model", "net.pt", "--scale", "2"], "evaluate: expected scale to be 4 like the network's, got 2"),
        (["--json", "out.txt"], "evaluate: expected --json to end in .json"),
        (["--picture", "out.txt"], "evaluate: expected OUT to end in"),
    ],
)
def test_evaluate_refuses_bad_input(options, message, folder, capsys):
    assert main(["evaluate", *options]) == 2
    assert message in capsys.readouterr().err

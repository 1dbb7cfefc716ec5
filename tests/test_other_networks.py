# SPDX-License-Identifier: Apache-2.0
"""Networks that spandrel knows and this library does not, in ``load_super_resolution`` and ``fastdense upscale``."""

import builtins
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from spandrel import ModelLoader
from spandrel.architectures.Compact import Compact
from spandrel.architectures.DAT import DAT
from spandrel.architectures.SwinIR import SwinIR

import fastdense
from fastdense.cli import main
from fastdense.models import load_super_resolution, save_super_resolution


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (19, 21, 3), numpy.uint8)).save("in.png")
    return tmp_path


def compact() -> torch.nn.Module:
    """SRVGGNet as in realesr-animevideov3, smaller."""
    return Compact(num_feat=8, num_conv=4, upscale=4).eval()


def swinir() -> torch.nn.Module:
    return SwinIR(
        img_size=16, window_size=8, depths=[2], num_heads=[2], embed_dim=8, upscale=2, upsampler="pixelshuffle"
    ).eval()


def dat() -> torch.nn.Module:
    return DAT(
        img_size=16, split_size=[2, 4], depth=[2], num_heads=[2], embed_dim=8, upscale=2, upsampler="pixelshuffledirect"
    ).eval()


@pytest.mark.parametrize("make", [compact, swinir, dat])
@pytest.mark.parametrize("wrapper", [None, "params_ema"])
def test_they_run_as_spandrel_runs_them(make, wrapper):
    state = make().state_dict()
    torch.save({wrapper: state} if wrapper else state, "net.pth")
    net, x = load_super_resolution("net.pth"), torch.rand(1, 3, 19, 21)
    wanted = ModelLoader().load_from_state_dict(dict(state))
    with torch.no_grad():
        made = net(x)
    assert made.shape == (1, 3, 19 * net.scale, 21 * net.scale) and net.scale == wanted.scale
    torch.testing.assert_close(made.clamp(0, 1), wanted(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fastdense.upscale(net, x), made)
    assert "runs through spandrel" in net.notes[0]


def test_srvggnet_runs_exactly_in_stripes():
    torch.save(compact().state_dict(), "net.pth")
    net, x = load_super_resolution("net.pth"), torch.rand(1, 3, 40, 7)
    with torch.no_grad():
        torch.testing.assert_close(fastdense.upscale(net, x, tail_rows=3), net(x), rtol=1e-5, atol=1e-6)
    net.halo -= 1  # the sixth convolution's row is missed
    assert (fastdense.upscale(net, x, tail_rows=3) - fastdense.upscale(net, x, tail_rows=40)).abs().max() > 1e-6


def test_others_run_in_stripes_only_where_memory_asks_for_them():
    torch.save(swinir().state_dict(), "net.pth")
    net, x = load_super_resolution("net.pth"), torch.rand(1, 3, 200, 8)
    plan = fastdense.sr.upscaling.plan_upscale
    assert plan(net, 5000, 5000, 4, None).tail_rows == 5000
    whole = plan(net, 200, 8, 4, None).bytes
    assert plan(net, 200, 8, 4, whole * 3 // 4).tail_rows < 200
    with torch.no_grad():
        difference = (fastdense.upscale(net, x, max_memory=whole * 3 // 4) - net(x)).abs()
    assert 0 < difference.max() < 0.1 and difference.mean() < 1e-3
    assert "overlap and are not exact" in net.notes[1]


@pytest.mark.parametrize("make", [compact, swinir])
def test_upscale(make, capsys):
    torch.save({"params": make().state_dict()}, "net.pth")
    assert main(["upscale", "in.png", "out.png", "--model", "net.pth"]) == 0
    assert "note: net.pth: " in capsys.readouterr().out
    descriptor = ModelLoader().load_from_state_dict(dict(make().state_dict()))
    scale = descriptor.scale
    assert Image.open("out.png").size == (21 * scale, 19 * scale)
    assert main(["upscale", "in.png", "out.png", "--model", "net.pth", "--scale", str(scale + 1)]) == 2
    assert f"expected scale to be {scale} like the network's, got {scale + 1}" in capsys.readouterr().err


def test_what_it_writes_is_the_networks_picture():
    state = compact().state_dict()
    torch.save(state, "net.pth")
    assert main(["upscale", "in.png", "out.png", "--model", "net.pth"]) == 0
    x = torch.from_numpy(numpy.asarray(Image.open("in.png")).copy()).permute(2, 0, 1)[None].float() / 255
    wanted = ModelLoader().load_from_state_dict(dict(state))(x)[0].permute(1, 2, 0).numpy() * 255
    made = numpy.asarray(Image.open("out.png")).astype(float)
    assert numpy.abs(made - wanted).max() <= 0.51


def test_pictures_smaller_than_a_network_takes():
    torch.save(swinir().state_dict(), "net.pth")
    net = load_super_resolution("net.pth")
    for size in ((1, 1), (1, 9), (3, 2), (8, 8)):
        with torch.no_grad():
            assert net(torch.rand(1, 3, *size)).shape == (1, 3, 2 * size[0], 2 * size[1])


def test_they_are_saved_by_their_own_library(folder):
    torch.save(compact().state_dict(), "net.pth")
    with pytest.raises(ValueError, match=r"expected net to be one of DRCN, .* got OtherNet"):
        save_super_resolution(load_super_resolution("net.pth"), "out.pt")
    assert not (folder / "out.pt").exists()


def test_weights_that_nobody_knows_or_that_do_not_fit():
    torch.save({"fc.weight": torch.zeros(1)}, "net.pth")
    with pytest.raises(ValueError, match=r"expected net.pth to hold a known network, got entries such as fc.weight"):
        load_super_resolution("net.pth")
    state = compact().state_dict()
    del state["body.2.weight"]
    torch.save(state, "net.pth")
    with pytest.raises(ValueError, match=r"expected net.pth to hold a whole network, got a problem with"):
        load_super_resolution("net.pth")


def test_without_spandrel_the_message_says_what_to_install(monkeypatch):
    torch.save(compact().state_dict(), "net.pth")
    plain = builtins.__import__

    def without(name, *args, **options):
        if name.partition(".")[0] == "spandrel":
            raise ModuleNotFoundError("No module named 'spandrel'", name="spandrel")
        return plain(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"spandrel is not installed; run: pip install 'fastdense\[spandrel\]'"):
        load_super_resolution("net.pth")

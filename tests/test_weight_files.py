# SPDX-License-Identifier: Apache-2.0
"""Weights of other programs: what they are wrapped in, what they do not tell, and files that claim what is not true."""

import pickle
import re
import struct
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fastdense import models
from fastdense.cli import main
from fastdense.models import load_super_resolution, save_super_resolution
from tests.test_super_resolution import rdn_upper, rename


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def network() -> models.RRDBNet:
    return models.RRDBNet(4, 1, 6, 3).eval()


def assert_same(loaded: nn.Module, net: nn.Module) -> None:
    x = torch.rand(1, loaded.colours, 7, 6)
    assert type(loaded) is type(net) and torch.equal(loaded(x), net.eval()(x))


# Every argument -------------------------------------------------------------------------------------------------------

NETWORKS = [
    models.SRCNN(3, (3, 5, 7), (4, 3)),
    models.VDSR(4, 5, 3),
    models.VDSR(2, 2, 3),
    models.DRCN(3, 3, 4),
    models.EDSR(3, 2, 5, 0.25, 1),
    models.EDSR(4, 0, 5),
    models.SRDenseNet(2, 3, 2, 5),
    models.SRDenseNet(0, 3, 2, 5),
    models.RDN(4, 3, 2, 3, 5, 255),
    *(models.RRDBNet(scale, 1, 4, 3) for scale in (1, 2, 4, 8)),
    models.RRDBNet(2, 0, 4, 3),
    models.RRDBNet(4, 2, 5, 3, in_channels=12),
    models.RRDBNet(1, 1, 5, 3, in_channels=1, out_channels=4, unshuffle=1),
    models.RRDBNet(2, 1, 5, 3, in_channels=4, out_channels=1, unshuffle=4),
]


@pytest.mark.parametrize(
    "net", NETWORKS, ids=lambda net: f"{type(net).__name__}-{'-'.join(map(str, net.settings().values()))}"
)
def test_saved_and_loaded_is_the_same_network(net):
    save_super_resolution(net, "net.pt")
    loaded = load_super_resolution("net.pt")
    assert loaded.settings() == net.settings() and loaded.scale == net.scale and not loaded.notes
    assert_same(loaded, net)


def test_files_of_version_0_1_0_load():
    net = models.EDSR(2, 2, 4, 0.3)
    settings = {"scale": 2, "residual_scale": 0.3}
    torch.save({"format": "fastdense-network-1", "settings": settings, "params": net.state_dict()}, "net.pt")
    loaded = load_super_resolution("net.pt")
    assert not loaded.notes
    assert_same(loaded, net)


def test_networks_of_other_classes_are_not_saved(folder):
    class Other(models.EDSR):
        pass

    with pytest.raises(ValueError, match=r"expected net to be one of DRCN, EDSR, .* got Other"):
        save_super_resolution(Other(2, 1, 3), "net.pt")
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "Whatever"}, "a problem with its class, Whatever"),
        ({"settings": {"scale": 4, "blocks": 10**9}}, "a problem with its blocks, 1000000000"),
        ({"settings": {"scale": 4, "width": float("nan")}}, "a problem with its width, nan"),
        ({"settings": {"scale": 4, "blocks": 3, "width": 200}}, r"which make [\d,]+ weights of"),
        ({"settings": {"scale": 4, "depth": 3}}, "unexpected keyword argument 'depth'"),
    ],
)
def test_settings_that_claim_more_than_there_is(change, message):
    save_super_resolution(network(), "net.pt")
    torch.save({**torch.load("net.pt", weights_only=True), **change}, "net.pt")
    with pytest.raises(ValueError, match=message):
        load_super_resolution("net.pt")


def test_networks_that_make_no_picture_are_refused_at_once(capsys):
    Image.fromarray(numpy.zeros((8, 8, 3), numpy.uint8)).save("in.png")
    save_super_resolution(models.RRDBNet(4, 1, 6, 3, in_channels=12), "net.pt")
    assert main(["upscale", "in.png", "out.png", "--model", "net.pt"]) == 2
    text = capsys.readouterr().err
    assert "upscale: expected a network from 1 or 3 channels to as many, got net.pt from 12 to 3" in text


# Wrappers -------------------------------------------------------------------------------------------------------------

PUT_IN = ["params-ema", "params_ema", "params", "model_state_dict", "state_dict", "model", "net", "network", "ema"]
PUT_IN += ["g", "generator", "weights"]
PREFIXES = ["module.", "_orig_mod.", "model.", "netG.module.", "generator.", "generator_ema.", "module._orig_mod."]


@pytest.mark.parametrize("wrapper", PUT_IN)
def test_wrappers(wrapper):
    net = network()
    torch.save({"iter": 5, wrapper: net.state_dict(), "optimizer": {"lr": 1e-4}}, "net.pth")
    assert_same(load_super_resolution("net.pth"), net)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_prefixes(prefix, wrapper):
    net = network()
    state = {prefix + key: value for key, value in net.state_dict().items()}
    torch.save({"epoch": 3, wrapper: state} if wrapper else state, "net.ckpt")
    assert_same(load_super_resolution("net.ckpt"), net)


def test_a_wrapper_in_a_wrapper():
    net = network()
    torch.save({"model": {"state_dict": net.state_dict()}}, "net.pth")
    assert_same(load_super_resolution("net.pth"), net)


def test_averaged_weights_come_first():
    net = network()
    last = {key: value + 1 for key, value in net.state_dict().items()}
    torch.save({"params": last, "params_ema": net.state_dict()}, "net.pth")
    assert_same(load_super_resolution("net.pth"), net)
    mmagic = {"step_counter": torch.tensor(1)}
    mmagic |= {f"generator.{key}": value for key, value in last.items()}
    mmagic |= {f"generator_ema.{key}": value for key, value in net.state_dict().items()}
    torch.save({"meta": {"epoch": 1}, "state_dict": mmagic}, "net.pth")
    assert_same(load_super_resolution("net.pth"), net)


def test_other_containers():
    from safetensors.torch import save_file

    net = network()
    save_file(net.state_dict(), "net.safetensors")
    assert_same(load_super_resolution("net.safetensors"), net)
    torch.save({"params": net.state_dict()}, "old.pth", _use_new_zipfile_serialization=False)
    assert_same(load_super_resolution("old.pth"), net)
    torch.save({key: nn.Parameter(value) for key, value in net.state_dict().items()}, "parameters")
    assert_same(load_super_resolution("parameters"), net)


# What weights do not tell ---------------------------------------------------------------------------------------------


def edsr_pytorch(net: models.EDSR, rgb_range: float, *, shifts: bool = True) -> dict[str, Tensor]:
    """By the names of EDSR-PyTorch, whose shifts are the mean colour times the range."""
    rules = (
        ("^conv_first", "head.0"),
        (r"^body\.(\d)\.conv1", r"body.\1.body.0"),
        (r"^body\.(\d)\.conv2", r"body.\1.body.2"),
        ("^conv_after_body", f"body.{len(net.body)}"),
        ("^upsample", "tail.0"),
        ("^conv_last", "tail.1"),
    )
    mean = torch.tensor([0.4488, 0.4371, 0.4040]) * rgb_range
    eye = torch.eye(3).view(3, 3, 1, 1)
    extra = {"sub_mean.weight": eye, "sub_mean.bias": -mean, "add_mean.weight": eye, "add_mean.bias": mean}
    return rename(net.state_dict(), rules) | (extra if shifts else {})


def edsr_in_other_words(state: dict[str, Tensor], x: Tensor, rgb_range: float, residual_scale: float) -> Tensor:
    """EDSR-PyTorch's forward pass on values up to ``rgb_range``, step by step."""

    def conv(name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[2] // 2)

    first = conv("head.0", conv("sub_mean", x * rgb_range))
    y = first + residual_scale * conv("body.0.body.2", torch.relu(conv("body.0.body.0", first)))
    y = conv("body.1", y) + first
    y = conv("tail.1", F.pixel_shuffle(conv("tail.0.0", y), 2))
    return conv("add_mean", y) / rgb_range


@pytest.mark.parametrize("rgb_range", [1, 255])
@pytest.mark.parametrize(("width", "residual_scale"), [(8, 1.0), (8, 0.1), (256, 0.1), (256, 1.0)])
def test_edsr_tells_its_range_and_is_told_its_factor(rgb_range, width, residual_scale):
    state = edsr_pytorch(models.EDSR(2, 1, width), rgb_range)
    torch.save(state, "net.pt")
    loaded, x = load_super_resolution("net.pt", residual_scale=residual_scale), torch.rand(1, 3, 6, 5)
    wanted = edsr_in_other_words(state, x, rgb_range, residual_scale)
    torch.testing.assert_close(loaded(x), wanted, rtol=1e-4, atol=1e-4)
    assert loaded.rgb_range == rgb_range and not loaded.notes
    usual = load_super_resolution("net.pt")
    assert usual.residual_scale == (0.1 if width == 256 else 1.0)
    assert usual.notes == (f"the weights do not tell residual_scale; took {usual.residual_scale:g}",)


def test_edsr_without_shifts_is_told_its_range():
    torch.save(edsr_pytorch(models.EDSR(2, 1, 4), 1, shifts=False), "net.pt")
    assert load_super_resolution("net.pt").rgb_range == 255
    assert load_super_resolution("net.pt", rgb_range=1).rgb_range == 1


@pytest.mark.parametrize(("names", "usual"), [(rdn_upper, 255), (dict, 1)])
def test_rdn_takes_the_range_of_those_who_named_it(names, usual):
    net, x = models.RDN(4, 2, 2, 3, 4), torch.rand(1, 3, 5, 6)
    torch.save(names(net.state_dict()), "net.pt")
    for rgb_range in (None, 1, 255):
        loaded, r = load_super_resolution("net.pt", rgb_range=rgb_range), rgb_range or usual
        torch.testing.assert_close(loaded(x), net(x * r) / r, rtol=1e-5, atol=1e-6)
        assert loaded.notes == ((f"the weights do not tell rgb_range; took {usual}",) if rgb_range is None else ())


def vdsr_of_others(state: dict[str, Tensor]) -> dict[str, Tensor]:
    last = len(state) - 1
    names = {"convs.0.weight": "input.weight", f"convs.{last}.weight": "output.weight"}
    names |= {f"convs.{at}.weight": f"residual_layer.{at - 1}.conv.weight" for at in range(1, last)}
    return {names[key]: value for key, value in state.items()}


@pytest.mark.parametrize(
    ("net", "names"),
    [(models.SRCNN(3), dict), (models.VDSR(3, 4, 5), vdsr_of_others), (models.VDSR(3, 12, 2), vdsr_of_others)],
)
def test_weights_that_do_not_tell_their_scale(net, names, capsys):
    torch.save(names(net.state_dict()), "net.pt")
    told, usual = load_super_resolution("net.pt", scale=3), load_super_resolution("net.pt")
    assert_same(told, net)
    assert told.notes == () and (usual.scale, usual.notes) == (2, ("the weights do not tell scale; took 2",))
    large = torch.rand(1, 1, 14, 18)
    torch.testing.assert_close(usual.refine(large), net.refine(large))
    Image.fromarray(numpy.zeros((40, 50, 3), numpy.uint8)).save("in.png")
    for scale in (None, 3):
        options = ["--model", "net.pt", *(["--scale", str(scale)] if scale else [])]
        assert main(["upscale", "in.png", "out.png", *options]) == 0
        assert ("net.pt: the weights do not tell scale; took 2 (--scale)" in capsys.readouterr().out) == (scale is None)
        with Image.open("out.png") as picture:
            assert picture.size == (50 * (scale or 2), 40 * (scale or 2))
        assert main(["evaluate", "--data", ".", *options]) == 0
        assert f"picture, x{scale or 2}" in capsys.readouterr().out
        Path("out.png").unlink()


@pytest.mark.parametrize(
    ("net", "arguments", "message"),
    [
        (models.EDSR(2, 1, 3), {"scale": 3}, "expected scale to be 2 like the network's, got 3"),
        (models.EDSR(2, 1, 3), {"residual_scale": 0.5}, "expected residual_scale to be 1 like the network's, got 0.5"),
        (models.SRCNN(2), {"rgb_range": 1}, "expected no rgb_range for SRCNN, got 1"),
        (models.RRDBNet(4, 1, 6, 3), {"residual_scale": 1}, "expected no residual_scale for RRDBNet, got 1"),
    ],
)
def test_arguments_that_do_not_fit(net, arguments, message, capsys):
    save_super_resolution(net, "net.pt")
    with pytest.raises(ValueError, match=message):
        load_super_resolution("net.pt", **arguments)
    flags = {"scale": "--scale", "residual_scale": "--res-scale", "rgb_range": "--rgb-range"}
    options = [word for name, value in arguments.items() for word in (flags[name], str(value))]
    assert main(["upscale", "in.png", "out.png", "--model", "net.pt", *options]) == 2
    assert f"fastdense: upscale: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["srcnn", "vdsr", "drcn"])
@pytest.mark.parametrize(("option", "message"), [("5", "one of 2, 3, 4, got 5"), ("2.5", "got 2.5"), ("nan", "finite")])
def test_scales_that_no_network_has(name, option, message, capsys):
    small = {"srcnn": models.SRCNN(2), "vdsr": models.VDSR(2, 3, 4), "drcn": models.DRCN(2, 2, 3)}
    torch.save(small[name].state_dict(), "net.pt")
    assert main(["upscale", "in.png", "out.png", "--model", "net.pt", "--scale", option]) == 2
    assert re.search(f"^fastdense: upscale: expected scale to be .*{message}", capsys.readouterr().err, re.M)


def test_ranges_that_no_network_has():
    torch.save(edsr_pytorch(models.EDSR(2, 1, 4), 1, shifts=False), "net.pt")
    for arguments in ({"rgb_range": 100}, {"residual_scale": float("nan")}):
        with pytest.raises(ValueError, match=rf"^load_super_resolution: expected {next(iter(arguments))} to be"):
            load_super_resolution("net.pt", **arguments)


def test_choices_are_printed(capsys):
    Image.fromarray(numpy.zeros((8, 9, 3), numpy.uint8)).save("in.png")
    torch.save(rdn_upper(models.RDN(4, 2, 2, 3, 4).state_dict()), "net.pt")
    assert main(["upscale", "in.png", "out.png", "--model", "net.pt"]) == 0
    assert "note: net.pt: the weights do not tell rgb_range; took 255 (--rgb-range)" in capsys.readouterr().out
    assert main(["upscale", "in.png", "out.png", "--model", "net.pt", "--rgb-range", "1"]) == 0
    assert "note" not in capsys.readouterr().out


# Malformed weights ----------------------------------------------------------------------------------------------------

KEY = "conv_hr.weight"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: w.to(torch.complex64), "floating point, got torch.complex64"),
        (lambda w: w.to(torch.int32), "floating point, got torch.int32"),
        (lambda w: w.to(torch.float8_e4m3fn), "floating point, got torch.float8_e4m3fn"),
        (lambda w: w * torch.nan, "finite, got NaN or infinity"),
        (lambda w: w / 0, "finite, got NaN or infinity"),
        (lambda w: w.to_sparse(), "plain tensor, got torch.sparse_coo"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "plain tensor, got a quantised one"),
        (lambda w: w.to("meta"), r"stored in the file, got a tensor without its numbers \(meta\)"),
        (lambda w: w[:1, :1, :1, :1].clone().expand(10**4, 10**4, 10**3, 100), "stored whole, got shape"),
    ],
)
def test_malformed_weights_are_refused_by_name(make, message):
    state = dict(network().state_dict())
    state[KEY] = make(state[KEY])
    torch.save(state, "net.pth")
    with pytest.raises(ValueError, match=rf"{KEY}.*{message}|got: .*"):
        load_super_resolution("net.pth")


def test_a_zip_bomb_is_refused_by_its_directory(monkeypatch):
    """256 MiB of zeros in less than 2."""
    torch.save(dict(network().state_dict()), "net.pth")
    bomb = zipfile.ZipFile("bomb.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with zipfile.ZipFile("net.pth") as archive, bomb:
        for name in archive.namelist():
            if not name.endswith("data/0"):
                bomb.writestr(name, archive.read(name))
                continue
            with bomb.open(name, "w", force_zip64=True) as entry:
                for _ in range(256):
                    entry.write(bytes(1 << 20))
    assert Path("bomb.pth").stat().st_size < 2 << 20
    monkeypatch.setattr(torch, "load", None)  # not called
    with pytest.raises(ValueError, match="compressed entries, expected them stored"):
        load_super_resolution("bomb.pth")


def test_entries_that_share_their_bytes_are_refused():
    torch.save(dict(network().state_dict()), "net.pth")
    content = bytearray(Path("net.pth").read_bytes())
    at = content.index(b"PK\x01\x02")  # of the directory: the size of its first entry
    content[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    Path("net.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"entries of [\d,]+ bytes in a file of|whole checkpoint"):
        load_super_resolution("net.pth")


def test_a_claim_of_terabytes_is_refused_at_once():
    """A tensor of 10^13 numbers, in a file that holds one of them."""
    torch.save({KEY: torch.zeros(1).expand(10**13)}, "net.pth")
    assert Path("net.pth").stat().st_size < 4096
    message = rf"expected {KEY} of net.pth to be stored whole, got shape \(10000000000000,\) of 4 bytes"
    with pytest.raises(ValueError, match=message):
        load_super_resolution("net.pth")


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", pickle.dumps({"a": 1})],
)
def test_files_that_are_no_weights(content):
    for name in ("net.pth", "net.safetensors"):
        Path(name).write_bytes(content)
        with pytest.raises(ValueError, match=r"whole checkpoint of tensors|tensors only"):
            load_super_resolution(name)

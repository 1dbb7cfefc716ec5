# SPDX-License-Identifier: Apache-2.0
"""Training for super-resolution: data, resuming, errors, and that it learns."""

import json
import re

import numpy
import pytest
import torch
from PIL import Image

from fastdense import models
from fastdense._support import InputError
from fastdense.cli import main
from fastdense.models import load_super_resolution
from fastdense.ops import bicubic_resize
from fastdense.train.super_resolution import Patches, SuperResolutionConfig, train_super_resolution


@pytest.fixture
def pictures(tmp_path):
    """A folder of six stripy pictures, whose edges bicubic enlargement blurs."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = numpy.random.default_rng(0)
    for number in range(6):
        small = random.integers(0, 2, (9, 9, 3)) * 200 + 20
        Image.fromarray(small.repeat(8, 0).repeat(8, 1).astype(numpy.uint8)).save(folder / f"{number}.png")
    return folder


def config(pictures, **options):
    small = {"steps": 20, "batch": 4, "patch": 12, "threads": 1, "checkpoint_seconds": 0.0}
    return SuperResolutionConfig(data=str(pictures), out=pictures.parent / "out", **{**small, **options})


def test_patches_belong_together():
    random = numpy.random.default_rng(0)
    sizes = [(40, 31, 3), (25, 60)]
    patches = Patches([random.integers(0, 256, size, dtype=numpy.uint8) for size in sizes], 1, 2, 12)
    small, large = patches.draw(seed=1, step=5, count=40)
    assert small.shape == (40, 1, 12, 12) and large.shape == (40, 1, 24, 24)
    remade = bicubic_resize(large, scale_factor=0.5, preset="matlab")
    assert (remade - small)[..., 3:-3, 3:-3].abs().max() < 2 / 255
    again = patches.draw(seed=1, step=5, count=40)
    assert torch.equal(again[0], small) and torch.equal(again[1], large)
    assert not torch.equal(patches.draw(seed=1, step=6, count=40)[0], small)


@pytest.mark.parametrize(
    ("model", "arguments"),
    [("srcnn", {}), ("rrdbnet", {"blocks": 1, "width": 4}), ("edsr_baseline", {"blocks": 1, "width": 4})],
)
def test_a_stopped_run_ends_with_the_same_weights(model, arguments, pictures):
    def weights(**options):
        train_super_resolution(config(pictures, model=model, model_kwargs=arguments, **options), progress=False)
        return load_super_resolution(pictures.parent / "out" / "model.pt").state_dict()

    whole = weights(fresh=True, steps=6)
    state = torch.load(pictures.parent / "out" / "checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] == 6

    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    original = Patches.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Patches, "draw", lambda self, *given: stop() if given[1] == 3 else original(self, *given))
        with pytest.raises(Stopped):
            weights(fresh=True, steps=6)
    resumed = weights(resume=True, steps=6)
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_of_the_command_line(dtype, pictures, monkeypatch):
    """16-bit types mean autocast; weights stay float32."""
    seen = set()
    forward = torch.nn.Conv2d.forward

    def watched(self, x):
        out = forward(self, x)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    options = ["--data", str(pictures), "--steps", "2", "--batch", "2", "--size", "12", "--threads", "1"]
    out = pictures.parent / dtype
    assert main(["train", "--task", "sr", *options, "--dtype", dtype, "--out", str(out)]) == 0
    assert seen == {torch.float32, getattr(torch, dtype)}  # held-out pictures are enlarged in float32
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert all(v.dtype == torch.float32 for v in state["model"]["net"].values())
    assert state["config"]["dtype"] == dtype and bool(state["scaler"]) == (dtype == "float16")
    with pytest.raises(ValueError, match=r"expected dtype to be one of float32, bfloat16, float16, got 'int8'"):
        train_super_resolution(config(pictures, dtype="int8", fresh=True), progress=False)


def test_it_learns_what_bicubic_cannot(pictures, capsys):
    options = ["--data", str(pictures), "--steps", "200", "--batch", "4", "--size", "16", "--lr", "5e-3"]
    options += ["--threads", "1", "--set", "kernels=(5, 1, 5)"]
    out = pictures.parent / "out"
    assert main(["train", "--task", "sr", *options, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "held-out pictures: " in text and f"wrote {out / 'model.pt'}" in text
    numbers = json.loads((out / "metrics.json").read_text())
    assert numbers["psnr"] > numbers["bicubic_psnr"] + 0.5
    assert load_super_resolution(out / "model.pt").scale == 2


def test_a_new_srcnn_is_nearly_bicubic():
    x = torch.rand(1, 1, 12, 12)
    expected = bicubic_resize(x, scale_factor=2, preset="matlab").clamp(0)
    assert (models.SRCNN(2)(x).clamp(0) - expected)[..., 6:-6, 6:-6].abs().max() < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "densenet121"], "train: expected --model of --task sr to be one of drcn"),
        (["--set", "depht=3"], "train: expected --set to name arguments of srcnn"),
        (["--scale", "7"], "SRCNN: expected scale to be one of 2, 3, 4, got 7"),
        (["--data", "missing"], "train: expected --data to be 'photographs' or a folder, got missing"),
        (["--steps", "0"], "train: expected steps, batch and patch to be positive"),
        (["--device", "cuda"], "train: device 'cuda' is not available: torch finds no CUDA GPU"),
        (
            ["--size", "999"],
            "five pictures or more that can be used, got 1; .* expected 1998 pixels or more to cut",
        ),
        (["--set", "scale=3"], "train: expected --scale 3, got --set scale"),
        (["--epochs", "3"], "train: expected no --epochs with --task sr"),
        (["--weights", "net.pt"], "train: expected no --weights with --task sr"),
        (["--label-smoothing", "0.1"], "train: expected no --label-smoothing with --task sr"),
        (["--task", "classify"], "train: expected no --steps with --task classify"),
    ],
)
def test_errors(options, message, pictures, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ["--data", str(pictures), "--steps", "1", "--out", str(pictures.parent / "out"), *options]
    assert main(["train", "--task", "sr", *given]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_pictures_that_are_too_small_are_named(pictures, capsys):
    """Too flat to be shrunk, to cut a patch from, and to measure on; the fifth picture is held out."""
    for name, size in (("a.png", (40, 1)), ("b.png", (40, 23)), ("3b.png", (40, 15))):
        Image.new("RGB", size).save(pictures / name)
    assert sorted(path.name for path in pictures.iterdir())[4] == "3b.png"
    options = ["--data", str(pictures), "--steps", "1", "--batch", "2", "--size", "12", "--threads", "1"]
    assert main(["train", "--task", "sr", *options, "--out", str(pictures.parent / "out")]) == 2
    assert "used, got 6; " in capsys.readouterr().err  # none is held out
    (pictures / "3b.png").unlink()
    Image.new("RGB", (40, 15)).save(pictures / "3b.png")
    for name in ("c.png", "d.png"):
        Image.new("RGB", (40, 40)).save(pictures / name)
    assert main(["train", "--task", "sr", *options, "--out", str(pictures.parent / "out")]) == 0
    text = capsys.readouterr().out
    assert f"skipped {pictures / 'a.png'}: expected 24 pixels or more to cut patches from, got 40 x 1" in text
    assert f"skipped {pictures / 'b.png'}: expected 24 pixels or more to cut patches from, got 40 x 23" in text
    assert f"skipped {pictures / '3b.png'}: expected 16 pixels or more to measure on, got 40 x 15" in text


def test_a_checkpoint_is_not_overwritten(pictures):
    train_super_resolution(config(pictures, steps=1), progress=False)
    with pytest.raises(ValueError, match=r"train: .*checkpoint.pt exists; continue it"):
        train_super_resolution(config(pictures, steps=1), progress=False)
    with pytest.raises(ValueError, match=r"expected .* to be of the same configuration, got a difference: batch was"):
        train_super_resolution(config(pictures, steps=1, batch=2, resume=True), progress=False)
    path = pictures.parent / "out" / "checkpoint.pt"
    torch.save({**torch.load(path, weights_only=True), "progress": {"step": "one"}}, path)
    with pytest.raises(InputError, match=r"checkpoint\.pt to be a whole checkpoint, got one that was changed"):
        train_super_resolution(config(pictures, steps=1, resume=True), progress=False)


def test_a_resumed_run_keeps_its_rate(pictures, capsys):
    train_super_resolution(config(pictures, steps=1, lr=0.02, resume=True), progress=False)
    assert "checkpoint.pt to resume: the run starts from the beginning" in capsys.readouterr().err
    train_super_resolution(config(pictures, steps=1, resume=True), progress=False)
    assert "starts from the beginning" not in capsys.readouterr().err
    metrics = json.loads((pictures.parent / "out" / "metrics.json").read_text())
    assert metrics["config"]["lr"] == 0.02


def test_the_advice_after_a_loss_that_is_not_finite_works(pictures, capsys):
    options = ["--data", str(pictures), "--steps", "4", "--batch", "2", "--size", "12", "--threads", "1"]
    options = ["train", "--task", "sr", *options, "--checkpoint-seconds", "0", "--out", str(pictures.parent / "out")]
    code, taken = main([*options, "--lr", "1e20"]), 0
    while code and taken < 30:
        line = capsys.readouterr().err.splitlines()[-1]
        advised = re.search(r"(?:--resume|--fresh) --lr [-+.e\d]*\d", line)
        assert advised, line
        code, taken = main([*options, *advised[0].split()]), taken + 1
    assert code == 0 < taken and (pictures.parent / "out" / "model.pt").exists()


def test_weights_of_the_last_step_are_checked(pictures, monkeypatch):
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: self.param_groups[0]["params"][0].data.fill_(torch.nan))
    with pytest.raises(ValueError, match=r"expected a finite network, got an infinite or NaN \S+ after step 1"):
        train_super_resolution(config(pictures, steps=1), progress=False)
    assert not (pictures.parent / "out" / "model.pt").exists()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    """Each would train by itself and write to the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="expected one process"):
        train_super_resolution(SuperResolutionConfig(out=tmp_path))

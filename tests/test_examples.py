# SPDX-License-Identifier: Apache-2.0
"""The example scripts run, at a tiny size, and learn."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from accelerate.state import AcceleratorState
from PIL import Image
from skimage import data
from torchvision.transforms.functional import pil_to_tensor

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytestmark = [
    pytest.mark.filterwarnings("error:fastdense"),
    pytest.mark.usefixtures("one_thread"),
]


def run(name: str, *arguments: object) -> list[float]:
    return runpy.run_path(str(EXAMPLES / name))["main"]([str(argument) for argument in arguments])


def assert_falls(losses: list[float], to: float) -> None:
    """The mean of the last quarter against the first loss."""
    last = losses[-max(len(losses) // 4, 1) :]
    assert sum(last) / len(last) < to * losses[0], losses


def test_every_example_is_listed_and_run():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    listed = {line.split("`")[1] for line in (EXAMPLES / "README.md").read_text().splitlines() if line[:3] == "| `"}
    assert names == listed
    text = Path(__file__).read_text()
    assert [name for name in sorted(names) if f'"{name}"' not in text] == []


def test_image_folder(tmp_path):
    for name, colour in (("dark", 40), ("light", 200)):
        (tmp_path / name).mkdir()
        for index in range(6):
            noise = torch.randint(colour - 30, colour + 30, (40, 40, 3), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(tmp_path / name / f"{index}.png")
    losses = run("image_folder.py", tmp_path, "--epochs", 5, "--batch", 6, "--size", 64, "--small")
    assert_falls(losses, 0.8)


def test_finetune(tmp_path):
    """A file of torchvision, pieces of two photographs, predictions of the kept model."""
    for name, photograph in (("cat", data.chelsea()), ("coffee", data.coffee())):
        (tmp_path / "in" / name).mkdir(parents=True)
        for at in range(6):
            piece = photograph[20 * at : 20 * at + 90, 30 * at : 30 * at + 90]
            Image.fromarray(piece).save(tmp_path / "in" / name / f"{at}.png")
    pictures = sorted((tmp_path / "in").rglob("*.png"))
    net = torchvision.models.densenet121()
    for norm in net.modules():
        norm.momentum = None  # of batch norms: running statistics are those of all images so far, as after training
    with torch.no_grad():
        net.train()(torch.stack([pil_to_tensor(Image.open(path).resize((32, 32))) for path in pictures]) / 64 - 2)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    options = ("--epochs", 6, "--batch", 6, "--size", 32, "--lr", 0.003, "--weights", tmp_path / "weights.pth")
    with pytest.warns(UserWarning, match=r"^fastdense: densenet121: classifier is a new layer for 2 classes: "):
        losses, classes = run(
            "finetune.py", tmp_path / "in", *options, "--out", tmp_path / "out", "--predict", *pictures
        )
    assert_falls(losses, 0.8)
    assert sum(name == path.parent.name for name, path in zip(classes, pictures, strict=True)) >= 9


def test_volumes(capsys):
    losses = run("volumes.py", "--steps", 12, "--batch", 4, "--size", 24, "--layers", 2, 2)
    assert_falls(losses, 0.8)
    assert "features.denseblock1  block       2       fused" in capsys.readouterr().out


def test_segmentation():
    losses = run("segmentation.py", "--steps", 15, "--batch", 2, "--size", 32, "--small")
    assert_falls(losses, 0.8)


def test_segment_digits(capsys):
    losses = run("segment_digits.py", "--steps", 12, "--batch", 4, "--size", 24, "--growth-rate", 4)
    assert_falls(losses, 0.8)
    assert "of those with ink" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_export(tmp_path):
    assert run("export.py", tmp_path / "net.onnx", "--size", 64, "--small") <= 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ("--count", 40, "--size", 32, "--layers", 2, 2, "--epochs", 2)
    assert_falls(run("lightning_densenet.py", *size, "--precision", precision), 0.8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("accumulate", "precision"), [(1, "no"), (2, "bf16")])
def test_accelerate(accumulate, precision):
    size = ("--count", 48, "--size", 32, "--layers", 2, 2, "--epochs", 2 * accumulate)
    AcceleratorState._reset_state(reset_partial_state=True)
    losses = run("accelerate_densenet.py", *size, "--accumulate", accumulate, "--precision", precision)
    assert_falls(losses, 0.8)


def test_ddp():
    """In two processes, of which the first reports."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", EXAMPLES / "ddp.py"]
    made = subprocess.run(
        [*launch, "--steps=2", "--batch=2", "--size=32"],
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr
    assert [line.split(":")[0] for line in made.stdout.splitlines()] == ["step 1", "step 2"]

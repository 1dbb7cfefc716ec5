# SPDX-License-Identifier: Apache-2.0
"""``fastdense predict`` and ``fastdense export``."""

import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdense import models
from fastdense.cli import export, main
from fastdense.sr.images import IMAGENET_MEAN, IMAGENET_STD
from fastdense.train import TrainConfig, train
from fastdense.train.prediction import load_classifier, predict
from tests.cases.training import paint, red_and_blue, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A network that tells red from blue."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny(folder / "out", data=str(red_and_blue(folder / "pictures")), epochs=4, augment="none")
    train(config, progress=False)
    return config


def rows(text: str) -> list[list[str]]:
    return list(csv.reader(text.splitlines()))


def by_hand(net: nn.Module, path: Path, size: int, mean: Any, std: Any, resized: int, mode: str) -> Tensor:
    """Probabilities by torchvision's transforms."""
    from torchvision.transforms import v2

    steps = [
        v2.Resize(resized, interpolation=v2.InterpolationMode(mode)),
        v2.CenterCrop(size),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, std),
    ]
    with torch.no_grad():
        return net.eval()(v2.Compose(steps)(Image.open(path).convert("RGB"))[None]).softmax(1)[0]


def test_a_checkpoint_knows_everything(
    trained: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for at, colour in enumerate(((210, 30, 50), (30, 50, 210), (190, 60, 30))):
        paint(tmp_path / f"in/{at}.png", colour, 500 + at)
    (tmp_path / "in/notes.txt").touch()
    (tmp_path / "in/torn.png").write_bytes(b"no picture")
    checkpoint = str(trained.out / "checkpoint.pt")
    assert main(["predict", str(tmp_path / "in"), "--weights", checkpoint, "--top=9", "--batch=2"]) == 1
    out, err = capsys.readouterr()
    head, *found = rows(out)
    assert head == ["file", "class_1", "probability_1", "class_2", "probability_2"]
    assert [(Path(row[0]).name, row[1]) for row in found] == [("0.png", "red"), ("1.png", "blue"), ("2.png", "red")]
    for row in found:
        assert float(row[2]) > 0.5 and float(row[2]) + float(row[4]) == pytest.approx(1, abs=2e-6)
    assert "skipped" in err and "torn.png" in err and "left out 1 other files (1 .txt)" in err
    assert main(["predict", str(tmp_path / "in"), "--weights", checkpoint, "--top=9", "--batch=2", "--workers=2"]) == 1
    again, said = capsys.readouterr()
    assert again == out and "torn.png" in said
    one = str(tmp_path / "in/1.png")
    assert main(["predict", one, "--weights", checkpoint, "--out", str(tmp_path / "made.json")]) == 0
    (entry,) = json.loads((tmp_path / "made.json").read_text())
    assert entry["file"] == one and [c["class"] for c in entry["classes"]] == ["blue"]
    assert entry["classes"][0]["probability"] == pytest.approx(float(found[1][2]), abs=1e-5)
    assert main(["predict", one, "--weights", checkpoint, "--json", "--dtype=bfloat16"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("[") :])[0]["classes"][0]["class"] == "blue"


def test_numbers_are_those_of_the_trainer(trained: TrainConfig) -> None:
    """The test pictures of the run, by its own batches."""
    from fastdense.train.data import load

    made = load_classifier("predict", str(trained.out / "checkpoint.pt"))
    data = load(trained.data, trained.size)
    paths = [data.test.path(at) for at in range(len(data.test))]
    found = zip(predict(made, paths), data.test.labels, strict=True)
    right = [one.classes[0] == data.classes[label] for one, label in found]
    history = json.loads((trained.out / "metrics.json").read_text())["history"]
    assert numpy.mean(right) == history[-1]["test_accuracy"]


def test_a_folder_of_save_pretrained(trained: TrainConfig, tmp_path: Path) -> None:
    made = load_classifier("predict", str(trained.out / "checkpoint.pt"))
    data = {"classes": list(made.classes), "size": 8, "mean": list(made.mean), "std": list(made.std)}
    models.save_pretrained(made.model, tmp_path, data=data)
    again = load_classifier("predict", str(tmp_path))
    assert (again.classes, again.size, again.mean) == (made.classes, 8, made.mean)


def test_files_of_torchvision_with_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = torchvision.models.densenet121(num_classes=3)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (70, 90, 3), numpy.uint8)).save(tmp_path / "a.png")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    command = ["predict", str(tmp_path / "a.png"), "--model=densenet121", f"--weights={tmp_path / 'weights.pth'}"]
    assert main([*command, "--size=32", "--top=3", f"--classes={tmp_path / 'names.txt'}"]) == 0
    (_, row) = rows(capsys.readouterr().out)
    wanted = by_hand(net, tmp_path / "a.png", 32, IMAGENET_MEAN, IMAGENET_STD, 37, "bilinear")
    made = {row[at]: float(row[at + 1]) for at in (1, 3, 5)}
    assert made == pytest.approx(dict(zip(("ant", "bee", "cat"), wanted.tolist(), strict=True)), abs=1e-5)


def test_timm_says_how_its_pictures_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DPN's mean and deviation are its authors', and pictures are resized by bicubic; classes are ImageNet's."""
    net = timm.create_model("dpn68").eval()
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *args, **kwargs: str(tmp_path / "model.safetensors"))
    Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (80, 70, 3), numpy.uint8)).save(tmp_path / "a.png")
    made = load_classifier("predict", "timm/dpn68.mx_in1k", "dpn68")
    cfg = net.pretrained_cfg
    assert (made.size, made.resized, made.interpolation) == (224, 256, "bicubic")
    assert made.mean == tuple(cfg["mean"]) != IMAGENET_MEAN
    assert made.classes == tuple(torchvision.models.DenseNet121_Weights.DEFAULT.meta["categories"])
    small = made.of_size(56)
    (found,) = predict(small, [tmp_path / "a.png"], top=1000)
    wanted = by_hand(net, tmp_path / "a.png", 56, cfg["mean"], cfg["std"], 64, "bicubic")
    assert torch.tensor(found.probabilities).sub(wanted.sort(descending=True).values).abs().max() <= 1e-5


def test_mean_max_pooling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a map of 8 x 8: four windows of 7 x 7."""
    net = models.dpn48b(num_classes=4).eval()
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (256, 256, 3), numpy.uint8)).save(tmp_path / "a.png")
    given = [str(tmp_path / "a.png"), f"--weights={tmp_path / 'weights.pth'}", "--size=256", "--top=4", "--json"]
    assert main(["predict", *given, "--model=dpn48b", "--mean-max"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    net.test_time_pooling = True
    wanted = by_hand(net, tmp_path / "a.png", 256, IMAGENET_MEAN, IMAGENET_STD, 293, "bilinear")
    made = {one["class"]: one["probability"] for one in entry["classes"]}
    assert made == pytest.approx({str(at): value for at, value in enumerate(wanted.tolist())}, abs=1e-5)


def test_mistakes_are_named(trained: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(trained.out / "checkpoint.pt")
    paint(tmp_path / "a.png", (9, 9, 9), 0)
    (tmp_path / "names.txt").write_text("one\n")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    models.save_pretrained(models.create("densenet121", image_channels=1, num_classes=2), tmp_path / "grey")
    picture = str(tmp_path / "a.png")
    for arguments, message in (
        ([picture], "predict: expected --weights, got none: a checkpoint of fastdense train"),
        (["missing", f"--weights={checkpoint}"], "predict: expected IN to be pictures or folders, got missing"),
        ([picture, f"--weights={tmp_path / 'other.pt'}"], "predict: expected --model for"),
        ([picture, "--weights=nothing"], "predict: expected --weights to be a checkpoint, a folder"),
        ([picture, "--weights=DEFAULT", "--model=vgg"], "predict: expected --model to be one of densenet121, "),
        ([picture, f"--weights={checkpoint}", "--top=0"], "predict: expected --top to be at least 1, got 0"),
        ([picture, f"--weights={checkpoint}", "--mean-max"], "predict: expected --mean-max with a DPN, got DenseNet"),
        ([picture, f"--weights={checkpoint}", f"--classes={tmp_path / 'names.txt'}"], "expected --classes to have 2"),
        ([picture, f"--weights={checkpoint}", "--out=made.txt"], "predict: expected --out to end in .csv, .json"),
        ([picture, f"--weights={checkpoint}", "--size=1"], "predict: cannot classify images of 1 pixels: "),
        (
            [picture, f"--weights={tmp_path / 'grey'}"],
            "a network that reads pictures of 3 channels, got one of 1",
        ),
    ):
        assert main(["predict", *arguments]) == 2
        assert message in capsys.readouterr().err, arguments


def emptied(content: dict[str, Any]) -> bytes:
    return b""


def cut(content: dict[str, Any]) -> bytes:
    whole = written(content)
    return whole[: len(whole) // 2]


def without_configuration(content: dict[str, Any]) -> bytes:
    return written({key: value for key, value in content.items() if key != "config"})


def without_classes(content: dict[str, Any]) -> bytes:
    return written({**content, "data": {}})


def with_data_of_another_kind(content: dict[str, Any]) -> bytes:
    return written({**content, "data": 3})


def with_nan(content: dict[str, Any]) -> bytes:
    return written({**content, "model": {key: value * math.nan for key, value in content["model"].items()}})


def written(content: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "damage", [emptied, cut, without_configuration, without_classes, with_data_of_another_kind, with_nan]
)
def test_a_damaged_checkpoint_ends_in_one_line(
    damage: Callable[[dict[str, Any]], bytes],
    trained: TrainConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = torch.load(trained.out / "checkpoint.pt", weights_only=True)
    (tmp_path / "damaged.pt").write_bytes(damage(content))
    for command in (["predict", "."], ["export", "made.pt2"]):
        assert main([*command, f"--weights={tmp_path / 'damaged.pt'}"]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"fastdense: {command[0]}: expected ") and "damaged.pt" in error, error
        assert error.count("\n") == 0


# --- export ----------------------------------------------------------------------------------------------------------

NEEDS_NOTHING = """
import sys
sys.modules["fastdense"] = None
import torch
module = torch.export.load(sys.argv[1]).module()
torch.save(module(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_torch_export(trained: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another process loads it without this library, with another number of images."""
    checkpoint = str(trained.out / "checkpoint.pt")
    assert main(["export", str(tmp_path / "net.pt2"), "--weights", checkpoint]) == 0
    out = capsys.readouterr().out
    assert "input: float32 [N, 3, 8, 8], output: logits [N, 2]" in out and "mean 0.485, 0.456, 0.406" in out
    images = torch.rand(5, 3, 8, 8)
    torch.save(images, tmp_path / "images.pt")
    files = [str(tmp_path / name) for name in ("net.pt2", "images.pt", "made.pt")]
    subprocess.run([sys.executable, "-c", NEEDS_NOTHING, *files], check=True)
    with torch.no_grad():
        wanted = load_classifier("export", checkpoint).model(images)
    torch.testing.assert_close(torch.load(files[2]), wanted, rtol=1e-4, atol=1e-5)


def test_onnx(trained: TrainConfig, tmp_path: Path) -> None:
    checkpoint = str(trained.out / "checkpoint.pt")
    assert main(["export", str(tmp_path / "net.onnx"), "--weights", checkpoint, "--size=16"]) == 0
    images = torch.rand(5, 3, 16, 16)
    (made,) = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        wanted = load_classifier("export", checkpoint).model(images)
    torch.testing.assert_close(torch.from_numpy(made), wanted, rtol=1e-4, atol=1e-5)


def test_exports_that_cannot_be(
    trained: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(trained.out / "checkpoint.pt")
    for arguments, message in (
        (["net.bin", f"--weights={checkpoint}"], "export: expected OUT to end in .onnx, .pt2, got net.bin"),
        (
            ["net.pt2", "--weights=runs/none.pt"],
            "export: expected --weights to be a checkpoint, a folder of save_pretr",
        ),
        (["net.pt2", "--weights=/none"], "export: expected --weights to be a checkpoint, a folder of save_pretrained"),
        (["net.pt2"], "export: expected --weights that know their network, or --model, got neither"),
        (["net.pt2", f"--weights={checkpoint}", "--opset=18"], "export: expected --opset with OUT that ends in .onnx"),
        (["net.pt2", f"--weights={checkpoint}", "--size=1"], "export: expected --size to be large enough, got 1"),
        (["net.pt2", "--model=densenet121", "--set", "layers=3"], "export: cannot create 'densenet121': "),
    ):
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err, arguments
    monkeypatch.setattr(export, "to_program", lambda *args: b"")
    monkeypatch.setattr(export, "largest_error", lambda *args: 0.5)
    assert main(["export", str(tmp_path / "net.pt2"), "--weights", checkpoint]) == 1
    assert "expected a relative error of at most 0.0001 of the exported network, got 5.0e-01" in capsys.readouterr().out
    assert not (tmp_path / "net.pt2").exists()


def test_export_writes_no_other_opset(trained: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.onnx"
    assert main(["export", str(path), f"--weights={trained.out / 'checkpoint.pt'}", "--opset=3"]) == 2
    assert "export: expected --opset to be one that torch can write for this network, got 3" in capsys.readouterr().err
    assert not path.exists()

# SPDX-License-Identifier: Apache-2.0
"""Models in folders and on the Hugging Face hub, which is replaced by a folder here."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastdense import models
from fastdense._support import InputError, MissingExtraError
from fastdense.models.hub import load_pretrained

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"depth": 10, "growth_rate": 4, "num_classes": 3}
DATA = {"classes": ["a", "b", "c"], "size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def small(**changes: Any) -> nn.Module:
    return models.create("densenet_cifar", **{**SMALL, **changes})


@torch.no_grad()
def assert_same(mine: nn.Module, theirs: nn.Module, channels: int = 3) -> None:
    x = torch.rand(2, channels, 32, 32)
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a sub-folder for each repository."""
    import huggingface_hub

    folder = tmp_path / "hub"

    def download(repo_id: str, filename: str, *, revision: str | None = None) -> str:
        path = folder / repo_id / (revision or "") / filename
        if not path.is_file():
            raise OSError(f"no {filename} in {repo_id}\nmore")
        return str(path)

    class Api:
        def __init__(self, token: str | None = None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
            assert private and exist_ok
            (folder / repo_id).mkdir(parents=True, exist_ok=True)

        def file_exists(self, repo_id: str, filename: str) -> bool:
            return (folder / repo_id / filename).exists()

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
            shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True)
            return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return folder


def test_a_folder_gives_the_model_again(tmp_path: Path) -> None:
    net = small(memory="min")
    assert models.save_pretrained(net, tmp_path / "out", data=DATA) == tmp_path / "out"
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    again = models.from_pretrained(tmp_path / "out")
    assert not again.training and again.features.denseblock1.memory == "min"
    assert_same(again, net)
    made, data = load_pretrained("predict", tmp_path / "out", kwargs={"memory": "balanced"})
    assert data == DATA and made.features.denseblock1.memory == "balanced"
    models.save_pretrained(again, tmp_path / "twice", data=DATA)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("name", ["resnet_cifar", "highway_cifar", "dpn48b"])
def test_every_classifier_can_be_kept(name: str, tmp_path: Path) -> None:
    net = models.create(name, num_classes=4)
    models.save_pretrained(net, tmp_path)
    assert_same(models.from_pretrained(tmp_path), net)


def test_a_replaced_last_layer_is_kept(tmp_path: Path) -> None:
    net = small()
    net.classifier = nn.Linear(net.classifier.in_features, 7)
    models.save_pretrained(net, tmp_path)
    again = models.from_pretrained(tmp_path)
    assert again.classifier.out_features == 7
    assert_same(again, net)


def test_timm_reads_what_is_written_and_is_read(tmp_path: Path) -> None:
    net = models.densenet121(num_classes=3, in_channels=1)
    models.save_pretrained(net, tmp_path / "mine", data={"size": 64})
    theirs = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True)
    assert theirs.num_classes == 3 and theirs.pretrained_cfg["input_size"] == [1, 64, 64]
    assert_same(theirs, net, channels=1)
    timm.models.save_for_hf(theirs, tmp_path / "theirs")
    assert_same(models.from_pretrained(tmp_path / "theirs"), theirs, channels=1)


def test_the_hub(hub: Path) -> None:
    net = small()
    address = models.push_to_hub(net, "me/small", data=DATA, private=True, token="secret")
    assert address == "https://huggingface.co/me/small/commit/1"
    assert_same(models.from_pretrained("me/small"), net)
    with pytest.raises(ValueError, match=r"hub with config.json, got 'me/small': no config.json in me/small$"):
        models.from_pretrained("me/small", revision="v1")


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.densenet_cifar(10, growth_rate=4, num_classes=3),
        lambda: models.densenet_cifar(10, 4, memory="min"),
        lambda: models.resnet_cifar(8, num_classes=3),
        lambda: models.fc_densenet56(num_classes=3, drop_rate=0.1),
        lambda: models.highway_mlp(num_classes=3),
    ],
)
def test_what_the_functions_make_is_saved(make: Any, tmp_path: Path) -> None:
    """As what create makes; with arguments by position, by name, and handed on."""
    net = make()
    again = models.from_pretrained(models.save_pretrained(net, tmp_path / "out"))
    assert type(again) is type(net) and str(again) == str(net.eval())
    for key, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "net.pth")
    with pytest.raises(InputError, match=r"got the file .*net\.pth, which load_weights reads$"):
        models.from_pretrained(tmp_path / "net.pth")


def test_a_model_card_says_how_to_load_it(tmp_path: Path, hub: Path) -> None:
    """Its code runs as it stands. What somebody wrote stays."""
    net = small()
    folder = models.save_pretrained(net, tmp_path / "flowers", data=DATA)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: fastdense\npipeline_tag: image-classification\n")
    for line in ("# flowers", "A densenet_cifar with 3 classes.", "* side in pixels: 32", "* classes: a, b, c"):
        assert line in card.splitlines()
    assert "choose a licence" in card
    code = card.partition("```python\n")[2].partition("```")[0].replace('"flowers"', repr(str(folder)))
    names: dict[str, Any] = {}
    exec(code, names)
    assert_same(names["model"], net)
    (folder / "README.md").write_text("mine")
    models.save_pretrained(net, folder)
    assert (folder / "README.md").read_text() == "mine"
    for _ in range(2):
        models.push_to_hub(net, "me/flowers", private=True, token="secret")
        uploaded = hub / "me/flowers/README.md"
        assert 'from_pretrained("me/flowers")' in uploaded.read_text() or uploaded.read_text() == "mine"
        uploaded.write_text("mine")
    many = models.create("densenet_cifar", **{**SMALL, "num_classes": 103})
    models.save_pretrained(many, tmp_path / "many", data={"classes": [str(at) for at in range(103)]})
    assert ", 98, 99 and 3 more\n" in (tmp_path / "many/README.md").read_text()


@pytest.mark.filterwarnings("ignore:fastdense. densenet121. classifier is a new layer")
def test_arguments_replace_those_of_the_folder(tmp_path: Path) -> None:
    models.save_pretrained(models.densenet121(num_classes=2), tmp_path)
    assert models.from_pretrained(tmp_path, num_classes=5).classifier.out_features == 5
    with pytest.raises(InputError, match=r"from_pretrained: cannot make densenet121 of .*: .*'depth'"):
        models.from_pretrained(tmp_path, depth=3)


def test_models_that_cannot_be_kept(tmp_path: Path) -> None:
    changed = small()
    changed.features.norm5 = nn.BatchNorm2d(7)
    values = small()
    for net, data, message in (
        (nn.Linear(1, 1), None, "a classifier made by a function of fastdense.models, got Linear"),
        (models.create("srcnn"), None, "a classifier made by a function of fastdense.models, got SRCNN"),
        (changed, None, r"densenet_cifar as it was made, .* features.norm5.weight"),
        (values, {"size": 32, "more": torch}, "densenet_cifar as it was made, and plain values"),
    ):
        with pytest.raises(ValueError, match=f"^save_pretrained: expected {message}"):
            models.save_pretrained(net, tmp_path / "out", data=data)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^from_pretrained: expected .* to hold config.json, as save_pretrained"):
        models.from_pretrained(tmp_path)
    config = tmp_path / "config.json"
    for text in ("{", "[]", "{}"):
        config.write_text(text)
        with pytest.raises(ValueError, match=r"^from_pretrained: expected .* to be a whole config.json"):
            models.from_pretrained(tmp_path)
    for name in ("resnet50", "srcnn"):
        config.write_text(json.dumps({"architecture": name}))
        with pytest.raises(
            ValueError, match=f"^from_pretrained: expected a network out of densenet121, .*, got '{name}'"
        ):
            models.from_pretrained(tmp_path)
    models.save_pretrained(small(), tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    del state["features.conv0.weight"]
    save_file(state, weights)
    with pytest.raises(ValueError, match=r"^from_pretrained: .* to have features.conv0.weight, but it is missing"):
        models.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"^from_pretrained: expected weights to be a file"):
        models.from_pretrained(tmp_path)


def test_packages_are_asked_for_when_they_are_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("huggingface_hub", "safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    install = r"run: pip install 'fastdense\[hub\]'"
    for call in (
        lambda: models.save_pretrained(small(), tmp_path),
        lambda: models.from_pretrained("me/small"),
        lambda: models.push_to_hub(small(), "me/small"),
    ):
        with pytest.raises(MissingExtraError, match=install):
            call()


def test_loading_a_file_needs_no_other_package(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "weights.pth")
    code = f"""
import sys
for name in ("torchvision", "timm", "huggingface_hub", "safetensors", "PIL"):
    sys.modules[name] = None
import fastdense
fastdense.models.create("densenet_cifar", weights={str(tmp_path / "weights.pth")!r}, **{SMALL!r})
print("loaded")
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert made.stdout == "loaded\n", made.stderr

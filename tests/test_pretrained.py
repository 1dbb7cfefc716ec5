# SPDX-License-Identifier: Apache-2.0
"""Weights of torchvision, timm, MONAI and torchxrayvision in the zoo's classifiers; all files are made here."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from monai.networks.nets import DenseNet121
from safetensors.torch import save_file
from timm.models import adapt_input_conv
from timm.utils import CheckpointSaver
from torch import Tensor, nn

import fastdense
from fastdense import models
from tests.cases.training import old_names, red_and_blue, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("densenet121", "densenet161", "densenet169", "densenet201")
FIRST = "features.conv0.weight"


def moved(net: nn.Module) -> nn.Module:
    """With running statistics and scales that are not those of a new network."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net.eval()


def pictures(channels: int = 3) -> Tensor:
    return torch.rand(2, channels, 32, 32)


@torch.no_grad()
def assert_same_outputs(mine: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of torch.hub, empty; nothing can be downloaded to it."""

    def refuse(url: str, *args: Any, **kwargs: Any) -> None:
        raise OSError(f"no network for {url}")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True)
    return folder


# --- published weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_enumerations_are_those_of_torchvision(name: str) -> None:
    mine, theirs = (
        getattr(place, f"{name.replace('densenet', 'DenseNet')}_Weights") for place in (models, torchvision.models)
    )
    assert list(mine.__members__) == list(theirs.__members__)
    for member, wanted in theirs.__members__.items():
        weights = mine[member]
        assert (weights.url, weights.meta) == (wanted.url, wanted.meta)
        assert len(weights.meta["categories"]) == 1000
        picture = torch.randint(256, (3, 300, 260), dtype=torch.uint8)
        assert torch.equal(weights.transforms()(picture), wanted.transforms()(picture))
        assert weights.transforms(crop_size=32)(picture).shape == (3, 32, 32)
    assert mine.DEFAULT is mine.IMAGENET1K_V1


@pytest.mark.parametrize("name", ["densenet121", "densenet201"])
def test_torchvisions_cached_file(name: str, hub: Path) -> None:
    theirs = moved(getattr(torchvision.models, name)())
    enumeration = getattr(models, f"{name.replace('densenet', 'DenseNet')}_Weights")
    torch.save(old_names(theirs.state_dict()), hub / enumeration.DEFAULT.url.rpartition("/")[2])
    make = getattr(models, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_outputs(make(weights="IMAGENET1K_V1"), theirs, pictures())
    if name == "densenet121":
        for weights in ("DEFAULT", f"{enumeration.__name__}.DEFAULT", enumeration.DEFAULT):
            assert torch.equal(make(weights=weights).classifier.weight, theirs.classifier.weight)
        of_torchvision = torchvision.models.DenseNet121_Weights.DEFAULT
        made = models.create(name, weights=of_torchvision, memory="min")
        assert torch.equal(made.classifier.weight, theirs.classifier.weight)


def test_weights_that_cannot_be_had_are_named(hub: Path) -> None:
    url = re.escape(models.DenseNet121_Weights.DEFAULT.url)
    with pytest.raises(ValueError, match=f"^densenet121: cannot load .*: no network .*; fetch {url} by other means"):
        models.densenet121(weights="DEFAULT")
    (hub / "densenet121-a639ec97.pth").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=f"^densenet121: cannot load DenseNet121_Weights.IMAGENET1K_V1: .*{url}"):
        models.densenet121(weights="DEFAULT")
    expected = "^densenet121: expected weights to be IMAGENET1K_V1, DEFAULT, timm/NAME of timm or a file, got 'V2'$"
    with pytest.raises(ValueError, match=expected):
        models.densenet121(weights="V2")
    with pytest.raises(ValueError, match=r"to be of DenseNet121_Weights, got DenseNet169_Weights.IMAG"):
        models.densenet121(weights=models.DenseNet169_Weights.DEFAULT)
    with pytest.raises(ValueError, match=r"^dpn68: expected weights to be timm/NAME of timm or a file, got 'DEFAULT'$"):
        models.dpn68(weights="DEFAULT")
    with pytest.raises(ValueError, match=r"^densenet121: expected weights to be a name or a file, got bool$"):
        models.densenet121(weights=True)  # type: ignore[arg-type]


# --- files -----------------------------------------------------------------------------------------------------------


def xray_names(net: nn.Module) -> dict[str, Tensor]:
    """torchxrayvision has torchvision's names, one channel, 18 classes, and thresholds that may be NaN."""
    return {**net.state_dict(), "op_threshs": torch.full((18,), torch.nan)}


def xray_net() -> nn.Module:
    net = torchvision.models.densenet121(num_classes=18)
    net.features.conv0 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    return net


Files = dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], int, str]]
FILES: Files = {
    "torchvision, old names": (
        lambda: torchvision.models.densenet121(num_classes=5),
        lambda net: old_names(net.state_dict()),
        3,
        "weights.pth",
    ),
    "timm, safetensors": (
        lambda: timm.create_model("densenet121", num_classes=4, in_chans=2),
        nn.Module.state_dict,
        2,
        "weights.safetensors",
    ),
    "MONAI": (lambda: DenseNet121(2, 1, 7), nn.Module.state_dict, 1, "weights.pt"),
    "torchxrayvision": (xray_net, xray_names, 1, "weights.pt"),
    "DataParallel": (
        lambda: nn.DataParallel(torchvision.models.densenet121(num_classes=6)),
        nn.Module.state_dict,
        3,
        "weights.bin",
    ),
}


@pytest.mark.filterwarnings("ignore:fastdense. densenet121. op_threshs")
@pytest.mark.parametrize("kind", FILES)
def test_files_say_classes_and_channels(kind: str, tmp_path: Path) -> None:
    make, entries, channels, name = FILES[kind]
    theirs = moved(make())
    (save_file if name.endswith("safetensors") else torch.save)(entries(theirs), tmp_path / name)
    assert_same_outputs(models.densenet121(weights=tmp_path / name), theirs, pictures(channels))


def test_thresholds_that_are_left_out_are_named(tmp_path: Path) -> None:
    torch.save(xray_names(xray_net()), tmp_path / "weights.pt")
    with pytest.warns(UserWarning, match=r"^fastdense: densenet121: op_threshs of .* is left out"):
        models.densenet121(weights=str(tmp_path / "weights.pt"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkpoints_of_timms_script(tmp_path: Path) -> None:
    """Which holds the options of its command line, and averages beside the weights."""
    import argparse

    net, averaged = (timm.create_model("dpn48b", num_classes=3) for _ in range(2))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    ema = timm.utils.ModelEmaV2(averaged)
    CheckpointSaver(
        net, optimizer, argparse.Namespace(lr=0.1, model="dpn48b"), ema, checkpoint_dir=str(tmp_path)
    ).save_checkpoint(0, 1.0)
    assert_same_outputs(models.dpn48b(weights=tmp_path / "last.pth.tar"), averaged, pictures())


def test_checkpoints_of_fastdense_train(tmp_path: Path) -> None:
    from fastdense.train import train

    config = tiny(tmp_path / "out", data=str(red_and_blue(tmp_path / "pictures")), epochs=1)
    train(config, progress=False)
    path = config.out / "checkpoint.pt"
    model = models.create("densenet_cifar", weights=path, **config.model_kwargs, num_classes=2)
    saved = torch.load(path, weights_only=True)["model"]
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("before", "after"), [(3, 1), (3, 5), (1, 3), (4, 1), (3, 2)])
def test_first_convolution_is_adapted_as_timm_does(before: int, after: int, tmp_path: Path) -> None:
    theirs = timm.create_model("densenet121", num_classes=2, in_chans=before)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    with pytest.warns(UserWarning, match=f"features.conv0 is adapted to {after} input channels: .* has {before}$"):
        mine = models.densenet121(weights=tmp_path / "weights.pth", image_channels=after)
    given = theirs.state_dict()[FIRST]
    torch.testing.assert_close(mine.state_dict()[FIRST], adapt_input_conv(after, given, before), rtol=0, atol=1e-6)


def test_another_number_of_classes_gets_a_new_head_and_says_so(tmp_path: Path) -> None:
    theirs = torchvision.models.densenet121(num_classes=5)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    word = "^fastdense: densenet121: classifier is a new layer for 3 classes: .*weights.pth has one for 5$"
    with pytest.warns(UserWarning, match=word) as caught:
        mine = models.densenet121(weights=tmp_path / "weights.pth", out_channels=3)
    assert caught[0].filename == __file__
    assert mine.classifier.weight.shape == (3, 1024)
    for key, value in mine.state_dict().items():
        assert key.startswith("classifier") or torch.equal(value, theirs.state_dict()[key]), key


def test_load_weights_into_models_of_others(tmp_path: Path) -> None:
    """And what fails leaves the model as it was."""
    given, converted = (fastdense.convert(torchvision.models.densenet121(num_classes=4)) for _ in range(2))
    torch.save(given.state_dict(), tmp_path / "weights.pth")
    models.load_weights(converted, tmp_path / "weights.pth")
    assert torch.equal(converted.classifier.weight, given.classifier.weight)
    other = models.densenet169(num_classes=4)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    blocks = "; its dense blocks have 6, 12, 24, 16 layers$"
    with pytest.raises(ValueError, match=f"^load_weights: expected weights of this model, got another's: .*{blocks}"):
        models.load_weights(other, tmp_path / "weights.pth")
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    whole, text = tmp_path / "whole.pt", tmp_path / "text.safetensors"
    torch.save(nn.Linear(1, 1), whole)
    text.write_text("no tensors")
    with pytest.raises(ValueError, match=r"^densenet121: .* such as a whole model; .*weights_only=False"):
        models.densenet121(weights=whole)
    with pytest.raises(ValueError, match=r"^densenet121: expected .*text.safetensors to be a whole checkpoint"):
        models.densenet121(weights=text)
    with pytest.raises(ValueError, match=r"to be a file, got .*; a folder of save_pretrained is read by"):
        models.densenet121(weights=tmp_path)
    with pytest.raises(ValueError, match=r"^create: expected no weights for srcnn; load_super_resolution reads"):
        models.create("srcnn", weights=whole)


# --- timm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], list[str]]:
    """Makes timm's download hand out a network's file; returns the repositories that it is asked for."""

    def publish(net: nn.Module) -> list[str]:
        asked: list[str] = []
        save_file(net.state_dict(), tmp_path / "model.safetensors")

        def hand_out(repo_id: str, filename: str, **kwargs: Any) -> str:
            asked.append(repo_id)
            assert filename == "model.safetensors"
            return str(tmp_path / filename)

        monkeypatch.setattr("timm.models._hub.hf_hub_download", hand_out)
        return asked

    return publish


@pytest.mark.parametrize("name", ["densenet121.ra_in1k", "densenet169.tv_in1k", "dpn68.mx_in1k", "dpn68b.ra_in1k"])
def test_weights_of_timm(name: str, published: Callable[[nn.Module], list[str]]) -> None:
    theirs = moved(timm.create_model(name))
    asked = published(theirs)
    mine = models.create(name.partition(".")[0], weights=f"timm/{name}")
    assert asked == [f"timm/{name}"]
    assert_same_outputs(mine, theirs, pictures())


def test_names_of_timm_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    known = "timm/densenet121.ra_in1k, timm/densenet121.tv_in1k"
    for name in ("timm/densenet121.no_such", "timm/densenet169.tv_in1k", "timm/resnet50.a1_in1k"):
        with pytest.raises(ValueError, match=f"^densenet121: expected weights to be one of {known}, got '{name}'$"):
            models.densenet121(weights=name)
    with pytest.raises(ValueError, match=r"^densenet264: expected weights to be a file, timm has none for it, got"):
        models.densenet264(weights="timm/densenet264")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", fail)
    with pytest.raises(ValueError, match=r"^dpn92: cannot load timm/dpn92.mx_in1k: no network; timm fetches it"):
        models.dpn92(weights="timm/dpn92.mx_in1k")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    state = models.densenet_cifar(10, growth_rate=4).state_dict()
    state["features.conv0.weight"][0, 0, 0, 0] = value
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"expected features.conv0.weight of .*net.pth to be finite, got NaN or inf"):
        models.create("densenet_cifar", weights=tmp_path / "net.pth", depth=10, growth_rate=4)


@pytest.mark.parametrize("content", [b"hi", b"", b"<html>"])
def test_other_files_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"of tensors, got another file, or one with more than tensors"):
        models.densenet121(weights=tmp_path / "net.pth")

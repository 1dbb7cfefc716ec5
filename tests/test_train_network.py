# SPDX-License-Identifier: Apache-2.0
"""The network of a training run: weights to begin with, frozen layers, averages, smoothing."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from fastdense import models
from fastdense._support import InputError
from fastdense.cli import main
from fastdense.models.weights import last_layer
from fastdense.train import TrainConfig, train
from fastdense.train.network import average, freeze, load_weights, set_training
from fastdense.train.prediction import load_classifier
from tests.cases.training import command, fastdense_lines, old_names, red_and_blue, tiny


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return red_and_blue(tmp_path / "pictures")


def torchvision_net(classes: int) -> nn.Module:
    return torchvision.models.densenet121(weights=None, num_classes=classes)


def own_net(classes: int) -> nn.Module:
    return models.create("densenet121", num_classes=classes)


def wrapped(state: dict[str, torch.Tensor], how: str) -> Any:
    prefix = {"DataParallel": "module.", "compiled": "_orig_mod.", "Lightning": "model."}.get(how, "")
    if how == "compiled and parallel":
        prefix = "module._orig_mod."
    state = {prefix + key: value for key, value in state.items()}
    if how == "Lightning":
        return {"epoch": 3, "state_dict": state}
    return {"model": state, "optimizer": {}} if how == "in model" else state


@pytest.mark.parametrize(
    "how", ["plain", "old", "DataParallel", "compiled", "compiled and parallel", "Lightning", "in model", "half"]
)
def test_files_of_torchvision(how: str, tmp_path: Path) -> None:
    theirs = torchvision_net(5).double()
    state = theirs.state_dict()
    if how == "old":
        state = old_names(state)
    if how == "half":
        state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
        theirs.load_state_dict(state)
    torch.save(wrapped(state, how), tmp_path / "weights.pth")
    mine = own_net(5).double()
    assert load_weights(mine, tmp_path / "weights.pth") == []
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x))


def test_files_of_safetensors_and_timm(tmp_path: Path) -> None:
    theirs = timm.create_model("densenet121", num_classes=7)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    mine = models.create("densenet121", num_classes=7)
    assert load_weights(mine, tmp_path / "model.safetensors") == []
    for key, value in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["dpn68", "resnet_cifar", "fractalnet", "highway_cifar", "resnet_in_resnet"])
def test_every_classifying_network_loads_its_own_and_gets_a_new_last_layer(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    old = models.create(name, num_classes=5)
    torch.save(old.state_dict(), path)
    same, other = (models.create(name, num_classes=classes) for classes in (5, 3))
    assert load_weights(same, path) == []
    assert all(torch.equal(value, old.state_dict()[key]) for key, value in same.state_dict().items())
    own = {key: value.clone() for key, value in other.state_dict().items()}
    layers = last_layer(other)
    assert layers == (["conv2", "bn2"] if name == "resnet_in_resnet" else [layers[0]])
    assert load_weights(other, path) == [f"{layers[0]} is a new layer for 3 classes: {path} has one for 5"]
    for key, value in other.state_dict().items():
        assert torch.equal(value, own[key] if key.rpartition(".")[0] in layers else old.state_dict()[key]), key


def test_features_alone_get_a_new_last_layer(tmp_path: Path) -> None:
    state = {key: value for key, value in torchvision_net(5).state_dict().items() if "classifier" not in key}
    torch.save(state, tmp_path / "features.pth")
    (word,) = load_weights(own_net(3), tmp_path / "features.pth")
    assert word.endswith("features.pth has none")


def test_unusable_weights_are_named(tmp_path: Path) -> None:
    good = torchvision_net(5).state_dict()
    whole = tmp_path / "whole.pth"
    torch.save(good, whole)
    key = "features.denseblock2.denselayer1.conv1.weight"
    files: dict[str, Any] = {
        "missing entry": ({k: v for k, v in good.items() if k != key}, f"state_dict to have {key}, but it is missing"),
        "unknown entry": (
            {**good, "features.more": torch.zeros(1)},
            "got unknown features.more",
        ),
        "other shape": ({**good, key: torch.zeros(3, 3, 1, 1)}, rf"{key} to have shape \(128, 128, 1, 1\), got \(3"),
        "numbers": ({"a": 1}, "a file of tensors by name"),
        "nothing": ({}, "a file of tensors by name"),
        "list": ([1], "entries by name, got a list"),
        "module": (torchvision_net(5), "tensors alone, got other objects, such as a whole model"),
        "text": (b"<html>", "a whole checkpoint of tensors"),
        "empty": (b"", "a whole checkpoint of tensors"),
        "half": (whole.read_bytes()[:1000], "a whole checkpoint of tensors"),
        "twice": ({**good, f"module.{key}": good[key]}, "got a second one"),
    }
    for name, (content, message) in files.items():
        for suffix in (".pth", ".safetensors"):
            path = tmp_path / (name + suffix)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif suffix == ".pth":
                torch.save(content, path)
            else:
                continue
            net = own_net(5)
            before = {key: value.clone() for key, value in net.state_dict().items()}
            with pytest.raises(InputError, match=f"^train: expected .*{message}"):
                load_weights(net, path)
            assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with pytest.raises(InputError, match="expected weights to be a file, got missing"):
        load_weights(own_net(5), Path("missing"))


def test_a_run_begins_with_weights_and_says_what_is_new(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tiny(tmp_path / "first", epochs=1, batch=256)  # ten digits
    train(first, progress=False)
    path = first.out / "checkpoint.pt"
    config = tiny(tmp_path / "second", data=str(pictures))
    assert main(command(config, f"--weights={path}", "--epochs=1", "--lr=1e-30", "--weight-decay=0")) == 0
    assert fastdense_lines(capsys) == [f"fastdense: classifier is a new layer for 2 classes: {path} has one for 10"]
    old, new = (torch.load(out / "checkpoint.pt", weights_only=True)["model"] for out in (first.out, config.out))
    parameters = dict(models.create("densenet_cifar", **config.model_kwargs, num_classes=2).named_parameters())
    for name in parameters:
        if name.startswith("classifier."):
            assert new[name].shape[0] == 2
        else:
            assert torch.equal(new[name], old[name]), name
    path.unlink()  # a resumed run has its own
    assert main(command(config, f"--weights={path}", "--weight-decay=0", "--resume", "--epochs=2")) == 0
    capsys.readouterr()
    assert main(command(config, "--resume")) == 2
    (line,) = fastdense_lines(capsys)
    assert "weights was 'checkpoint.pt' and is None" in line


def test_averaged_weights_are_what_a_checkpoint_gives(pictures: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path / "out", data=str(pictures), ema=0.9)
    train(config, progress=False)
    state = torch.load(config.out / "checkpoint.pt", weights_only=True)
    net = models.create("densenet_cifar", **config.model_kwargs, num_classes=2)
    assert load_weights(net, config.out / "checkpoint.pt") == []
    assert all(torch.equal(value, state["averaged"][key]) for key, value in net.state_dict().items())
    assert not torch.equal(state["averaged"]["classifier.weight"], state["model"]["classifier.weight"])


def test_averages_follow_their_formula_and_are_tested(pictures: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """mean <- d mean + (1 - d) weights, d = min(decay, n / (9 + n)) after step n."""
    seen: list[dict[str, torch.Tensor]] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD) -> None:
        step(self)
        seen.append({str(i): p.detach().clone() for i, p in enumerate(self.param_groups[0]["params"])})

    first: list[torch.Tensor] = []
    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    monkeypatch.setattr(
        "fastdense.train.loop.set_training",
        lambda model: (set_training(model), first.extend(p.detach().clone() for p in model.parameters())),
    )
    config = tiny(tmp_path / "out", data=str(pictures), ema=0.25, batch=6)
    result = train(config, progress=False)
    assert len(seen) == 6
    means = [value.double() for value in first]
    for number, values in enumerate(seen, 1):
        decay = min(0.25, number / (9 + number))
        means = [decay * mean + (1 - decay) * values[str(at)].double() for at, mean in enumerate(means)]
    state = torch.load(config.out / "checkpoint.pt", weights_only=True)
    net = models.create("densenet_cifar", **config.model_kwargs, num_classes=2)
    for expected, (name, _) in zip(means, net.named_parameters(), strict=True):
        torch.testing.assert_close(state["averaged"][name].double(), expected, rtol=1e-5, atol=1e-7, msg=name)
    plain = train(dataclasses.replace(config, out=tmp_path / "plain", ema=0.0), progress=False)
    assert plain.history[0]["loss"] == result.history[0]["loss"]
    assert plain.history[0]["test_loss"] != result.history[0]["test_loss"]


def test_average_takes_running_statistics_and_counts() -> None:
    one, two = (nn.BatchNorm1d(2) for _ in range(2))
    two.running_mean.fill_(2.0)
    two.num_batches_tracked.fill_(5)
    average(one, two, 0.999, 1)
    assert one.running_mean.tolist() == pytest.approx([1.8, 1.8])  # d = 1 / 10
    assert int(one.num_batches_tracked) == 5


@pytest.mark.parametrize("model", ["densenet_cifar", "highway_cifar"])
def test_frozen_layers_stay(model: str, pictures: Path, tmp_path: Path) -> None:
    arguments = {"depth": 10, "growth_rate": 4, "drop_rate": 0.5} if model == "densenet_cifar" else {}
    made = tiny(tmp_path / "made", data=str(pictures), model=model, model_kwargs=arguments)
    train(made, progress=False)
    path = made.out / "checkpoint.pt"
    config = dataclasses.replace(made, out=tmp_path / "frozen", weights=path, freeze=True, lr=0.5, epochs=2)
    result = train(config, progress=False)
    old, new = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (made.out, config.out))
    for key, value in new["model"].items():
        assert torch.equal(value, old["model"][key]) != key.startswith("classifier."), key
    assert len(new["optimizer"]["state"]) == 2
    assert result.history[0]["accuracy"] > 0.5


@pytest.mark.parametrize(
    ("given", "kind"),
    [("norm=group", nn.GroupNorm), ('norm=("group", {"num_groups": 1})', nn.GroupNorm), ("act=gelu", nn.GELU)],
)
def test_norms_and_activations_from_the_command_line(
    given: str, kind: type[nn.Module], pictures: Path, tmp_path: Path
) -> None:
    config = tiny(tmp_path / "out", data=str(pictures))
    assert main(command(config, "--set", given, "--epochs=1", "--memory=min")) == 0
    assert main(command(config, "--set", given, "--epochs=2", "--resume")) == 0
    net = load_classifier("test", str(config.out / "checkpoint.pt")).model
    found = {type(module) for module in net.modules()}
    assert kind in found and not {nn.BatchNorm2d, nn.ReLU} <= found


def test_unknown_norms_are_named(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path / "out", data=str(pictures))
    assert main(command(config, "--set", "norm=layer")) == 2
    (line,) = fastdense_lines(capsys)
    assert "expected norm to be one of batch, instance, group, got 'layer'" in line


def test_frozen_modules_drop_nothing() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), nn.Dropout(0.5), nn.Linear(2, 2))
    freeze(net)
    set_training(net)
    assert [module.training for module in net.modules()] == [True, False, False, False, True, True]


def test_smoothing_counts_for_training_alone(pictures: Path, tmp_path: Path) -> None:
    """A rate of nearly 0: both runs have the weights they began with."""
    results = [
        train(
            tiny(tmp_path / f"{smoothing}", data=str(pictures), lr=1e-30, batch=40, label_smoothing=smoothing),
            progress=False,
        ).history[0]
        for smoothing in (0.0, 0.2, 0.4)
    ]
    assert results[0]["test_loss"] == results[1]["test_loss"]
    losses = [result["loss"] for result in results]
    assert losses[1] - losses[0] == pytest.approx(losses[2] - losses[1], rel=1e-4) != 0  # linear in it


def test_weights_that_are_not_finite_are_refused(pictures: Path, tmp_path: Path) -> None:
    config: TrainConfig = tiny(tmp_path / "out", data=str(pictures))
    net = models.create("densenet_cifar", **config.model_kwargs, num_classes=2)
    nn.init.constant_(net.classifier.weight, float("nan"))
    torch.save(net.state_dict(), tmp_path / "nan.pth")
    with pytest.raises(InputError, match=r"train: expected classifier\.weight of .* to be finite, got NaN or infinity"):
        train(dataclasses.replace(config, weights=tmp_path / "nan.pth"), progress=False)

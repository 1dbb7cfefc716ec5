# SPDX-License-Identifier: Apache-2.0
"""Training: data, loop, and checkpoints that survive a kill at any moment."""

import copy
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdense._support import InputError
from fastdense.cli import main
from fastdense.train import NonFiniteLossError, TrainConfig, checkpoint, train
from fastdense.train.data import augment, load_digits, load_folder, plan_epoch
from fastdense.train.loop import learning_rate
from tests.cases.training import assert_same_weights, tiny, weights

# Trains with the JSON on the command line, again and again; each time a fork dies by SIGKILL in the n-th write of a
# checkpoint, in the middle of the file or right behind it.
CHILD = """
import json, os, signal, sys
from pathlib import Path
import PIL.Image, PIL.ImageOps, torch, tqdm
import torch._dynamo  # SGD loads it; once, instead of in each fork
from fastdense.train import TrainConfig, checkpoint, train

fields, kills = json.loads(sys.argv[1])
config = TrainConfig(**{**fields, "out": Path(fields["out"])})

def train_until(kill_at, inside):
    save_tensors, save_checkpoint, written = torch.save, checkpoint.save, 0

    def dying_save(state, file):
        nonlocal written
        written += 1
        if written == kill_at and inside:
            file.write(b"half a file")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save_tensors(state, file)

    def dying_checkpoint(path, state):
        save_checkpoint(path, state)
        if written == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save, checkpoint.save = dying_save, dying_checkpoint
    train(config, progress=False)

for kill_at, inside in kills:
    child = os.fork()
    if not child:
        try:
            train_until(kill_at, inside)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
"""


def paint(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    """A picture of one colour with noise."""
    noise = np.random.default_rng(seed).integers(-30, 31, (12, 14, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for seed in range(20):
        paint(folder / "red" / f"{seed}.png", (200, 40, 40), seed)
        paint(folder / "blue" / f"{seed}.png", (40, 40, 200), 100 + seed)
    return folder


@pytest.fixture
def trained(pictures: Path, tmp_path: Path) -> TrainConfig:
    """A finished run of two epochs with four steps each."""
    config = tiny(tmp_path / "whole", data=str(pictures), epochs=2)
    train(config, progress=False)
    return config


def test_killed_runs_end_with_the_same_bits(pictures: Path, tmp_path: Path) -> None:
    kwargs = {"depth": 10, "growth_rate": 4, "drop_rate": 0.2}
    config = tiny(
        tmp_path / "killed", data=str(pictures), epochs=2, model_kwargs=kwargs, checkpoint_seconds=0, resume=True
    )
    whole = dataclasses.replace(config, out=tmp_path / "whole", checkpoint_seconds=1e9)
    expected = train(whole, progress=False)
    # Before the first checkpoint; behind step 2; while step 3 is written; behind step 3; at the end of the epoch.
    kills = [(1, True), (2, False), (1, True), (1, False), (1, False)]
    job = json.dumps([{**dataclasses.asdict(config), "out": str(config.out)}, kills])
    child = subprocess.run([sys.executable, "-c", CHILD, job], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    progress = torch.load(config.out / "checkpoint.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 4)
    result = train(config, progress=False)
    assert_same_weights(whole.out, config.out)
    timeless = [[{**entry, "seconds": 0} for entry in run.history] for run in (expected, result)]
    assert timeless[0] == timeless[1]
    assert not list(config.out.glob(".*"))


def test_failing_replace_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    state = {"config": {}, "progress": {"step": 1}}
    checkpoint.save(path, state)

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {**state, "progress": {"step": 2}})
    assert checkpoint.load(path, {})["progress"] == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign", "flipped"])
def test_damaged_checkpoint_is_named(trained: TrainConfig, damage: str) -> None:
    path = trained.out / "checkpoint.pt"
    whole = path.read_bytes()
    if damage == "foreign":
        torch.save({"weights": torch.zeros(2)}, path)
    elif damage == "flipped":
        path.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello\n"}[damage])
    with pytest.raises(InputError, match=r"checkpoint\.pt to be a whole checkpoint.*delete it, or start anew"):
        train(dataclasses.replace(trained, resume=True), progress=False)


def nodes(tree: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every entry of a tree of dicts and lists; of a long one, the first and the last entry."""
    children = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if type(tree) is list else []
    chosen = children if len(children) <= 12 else [children[0], children[-1]]
    return [where] * bool(where) + [path for key, child in chosen for path in nodes(child, (*where, key))]


REMOVED = object()


def edited(tree: Any, where: tuple[Any, ...], value: object) -> Any:
    """A copy of a tree with another value, or none, in one place."""
    tree = copy.deepcopy(tree)
    place = tree
    for key in where[:-1]:
        place = place[key]
    if value is REMOVED:
        del place[where[-1]]
    else:
        place[where[-1]] = value
    return tree


def test_edited_checkpoints_are_named(trained: TrainConfig) -> None:
    """Every entry in turn becomes something else, or is gone."""
    path = trained.out / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    assert checkpoint.load(path, {})["progress"] == state["progress"]
    values = [REMOVED, None, True, "text", -1, 10**9, float("nan"), [], {"a": 1}, torch.zeros(2, 3)]
    tried = 0
    for where in nodes(state):
        old = functools.reduce(lambda tree, key: tree[key], where, state)
        for value in values:
            if type(value) is type(old) and not isinstance(value, torch.Tensor) and value == old:
                continue
            torch.save(edited(state, where, value), path)
            with pytest.raises(InputError, match=r"checkpoint\.pt to be a whole checkpoint, got .*--fresh"):
                checkpoint.load(path, {})
            tried += 1
    assert tried > 300


def command(config: TrainConfig, *more: str) -> list[str]:
    """What to type for a run of :func:`tiny`."""
    fields = {"data": config.data, "batch": config.batch, "size": config.size, "threads": 1, "out": config.out}
    options = [f"--{name}={value}" for name, value in {**fields, **config.model_kwargs}.items()]
    return ["train", *[option.replace("growth_rate", "growth-rate") for option in options], *more]


def fastdense_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastdense:")]


def test_an_edited_checkpoint_ends_in_one_line(trained: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    path = trained.out / "checkpoint.pt"
    assert main(command(trained, "--resume")) == 0
    state = torch.load(path, weights_only=True)
    torch.save(edited(state, ("progress", "history"), []), path)
    capsys.readouterr()
    assert main(command(trained, "--resume")) == 2
    (line,) = fastdense_lines(capsys)
    assert "got one that was changed after it had been written; delete it, or start anew with --fresh" in line


def test_state_of_another_network_is_named(trained: TrainConfig) -> None:
    """Where the digest fits and the contents do not, as after a change of fastdense."""
    path = trained.out / "checkpoint.pt"
    state = checkpoint.load(path, {})
    for entry in ("model", "optimizer", "progress", "rng"):
        checkpoint.save(path, {**state, entry: {}})
        with pytest.raises(InputError, match=r"checkpoint\.pt to be a whole checkpoint, got .*--fresh"):
            train(dataclasses.replace(trained, resume=True), progress=False)


def test_checkpoint_of_another_configuration_is_refused(trained: TrainConfig) -> None:
    for changes, name in (
        ({"momentum": 0.5}, "momentum was 0.9 and is 0.5"),
        ({"seed": 1}, "seed"),
        ({"memory": "plain"}, "plain"),
    ):
        with pytest.raises(InputError, match=f"same configuration, got a difference: {name}"):
            train(dataclasses.replace(trained, resume=True, **changes), progress=False)
    paint(Path(trained.data) / "red" / "more.png", (200, 40, 40), 7)
    with pytest.raises(InputError, match="difference: data was"):
        train(dataclasses.replace(trained, resume=True), progress=False)


def test_existing_checkpoint_asks_for_resume_or_fresh(trained: TrainConfig) -> None:
    with pytest.raises(InputError, match="--resume, or start anew with --fresh"):
        train(trained, progress=False)
    before = weights(trained.out)
    train(dataclasses.replace(trained, fresh=True, seed=1), progress=False)
    assert not torch.equal(weights(trained.out)["classifier.weight"], before["classifier.weight"])


def test_resuming_a_finished_run_reports_it_again(trained: TrainConfig) -> None:
    first = json.loads((trained.out / "metrics.json").read_text())
    result = train(dataclasses.replace(trained, resume=True), progress=False)
    assert result.history == first["history"]


def test_non_finite_loss_stops_before_the_checkpoint(pictures: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path / "out", data=str(pictures), lr=1e30, checkpoint_seconds=0)
    with pytest.raises(NonFiniteLossError, match=r"finite (loss|network), got .* step [2-4]"):
        train(config, progress=False)
    state = checkpoint.load(config.out / "checkpoint.pt", {})
    assert np.isfinite(state["progress"]["loss_sum"]) and state["progress"]["step"] >= 1
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize(
    ("seconds", "answers"),
    [("0", ["--resume", "--fresh"]), ("0", ["--fresh"]), ("1e9", ["--fresh"])],  # with a checkpoint, before the first
)
def test_the_advice_after_a_non_finite_loss_works(
    pictures: Path, tmp_path: Path, seconds: str, answers: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path / "out", data=str(pictures))
    options = command(config, "--epochs=1", f"--checkpoint-seconds={seconds}")
    code, taken = main([*options, "--lr=1e5"]), []
    while code and len(taken) < 10:
        (line,) = (line for line in fastdense_lines(capsys) if "expected a finite" in line)
        assert not (config.out / "metrics.json").exists()
        advised = dict(re.findall(r"(--resume|--fresh) (--lr [-+.e\d]*\d)", line))
        taken.append(next(answer for answer in answers if answer in advised))
        code = main([*options, taken[-1], *advised[taken[-1]].split()])
    assert code == 0 and taken and taken[0] == answers[0]


def test_a_loss_that_no_rate_can_mend_gets_other_advice(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path / "out", data=str(pictures), checkpoint_seconds=0, epochs=1)
    train(config, progress=False)
    entropy = torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *given, **options: torch.nan * entropy(*given))
    with pytest.raises(NonFiniteLossError, match=r"nan in step 5 .* Start anew at a smaller rate: --fresh --lr 0.01"):
        train(dataclasses.replace(config, resume=True, epochs=2), progress=False)
    with pytest.raises(NonFiniteLossError, match=r"nan in step 1 .* the weights, the pictures or the dtype are to bla"):
        train(dataclasses.replace(config, fresh=True), progress=False)


class Poisoned(torch.optim.SGD):
    """Leaves a NaN in the weights behind the last of four steps, whose loss was still finite."""

    steps = 0

    @torch.no_grad()
    def step(self, *arguments: Any) -> None:
        super().step(*arguments)
        self.steps += 1
        if self.steps == 4:
            self.param_groups[0]["params"][0].view(-1)[0] = float("nan")


def test_the_last_step_is_checked_too(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "SGD", Poisoned)
    config = tiny(tmp_path / "out", data=str(pictures), checkpoint_seconds=0)
    with pytest.raises(NonFiniteLossError, match=r"expected a finite (test loss|network), got .* after step 4"):
        train(config, progress=False)
    assert checkpoint.load(config.out / "checkpoint.pt", {})["progress"]["step"] == 3
    assert not (config.out / "metrics.json").exists()


def test_a_resumed_run_keeps_its_rate_and_epochs_or_says_what_changed(
    trained: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    first = json.loads((trained.out / "metrics.json").read_text())
    assert (first["config"]["lr"], first["config"]["epochs"]) == (0.1, 2)
    assert main(command(trained, "--resume")) == 0
    again = json.loads((trained.out / "metrics.json").read_text())
    assert fastdense_lines(capsys) == [] and again["config"]["epochs"] == 2 and again["history"] == first["history"]
    assert main(command(trained, "--resume", "--epochs=4", "--lr=0.02")) == 0
    assert fastdense_lines(capsys) == [
        "fastdense: epochs was 2 and is 4 from step 9 on",
        "fastdense: lr was 0.1 and is 0.02 from step 9 on",
    ]
    longer = json.loads((trained.out / "metrics.json").read_text())
    assert longer["history"][:2] == first["history"] and len(longer["history"]) == 4
    assert longer["history"][3]["lr"] == pytest.approx(learning_rate(15, 16, 0.02))
    assert main(command(trained, "--resume", "--epochs=3")) == 2
    assert "expected epochs to be at least 4, with which" in fastdense_lines(capsys)[0]


def test_folder_run_learns_and_writes_its_files(trained: TrainConfig) -> None:
    metrics = json.loads((trained.out / "metrics.json").read_text())
    assert metrics["test_accuracy"] > 0.8
    assert metrics.keys() == {
        "config", "versions", "classes", "images", "skipped", "parameters", "test_accuracy", "history"
    }  # fmt: skip
    assert metrics["classes"] == ["blue", "red"]
    assert metrics["images"] == {"train": 32, "test": 8, "skipped": 0, "size": 8}
    assert [entry["epoch"] for entry in metrics["history"]] == [1, 2]
    keys = {"epoch", "loss", "accuracy", "test_loss", "test_accuracy", "lr", "seconds"}
    assert all(entry.keys() == keys for entry in metrics["history"])
    with Image.open(trained.out / "curves.png") as picture:
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 1


def test_corrupt_picture_is_named_skipped_and_counted(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (pictures / "red" / "0.png").read_bytes()
    (pictures / "red" / "broken.png").write_bytes(whole[: len(whole) // 2])
    config = tiny(tmp_path / "out", data=str(pictures))
    train(config, progress=False)
    assert "broken.png" in capsys.readouterr().err
    metrics = json.loads((config.out / "metrics.json").read_text())
    assert metrics["images"]["skipped"] == 1 and "broken.png" in metrics["skipped"][0]


def test_unusable_folders_are_named(pictures: Path, tmp_path: Path) -> None:
    (pictures / "green").mkdir()
    with pytest.raises(InputError, match="green to hold pictures, got none"):
        load_folder(pictures)
    (pictures / "green" / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="green to hold a readable picture, got none"):
        load_folder(pictures)
    with pytest.raises(InputError, match="at least 2 classes, got 0"):
        load_folder(pictures / "red")
    with pytest.raises(InputError, match="'digits' or a folder"):
        load_folder(tmp_path / "absent")


def test_train_and_val_folders_replace_the_split(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2)):
        for name in ("a", "b"):
            for seed in range(count):
                paint(tmp_path / part / name / f"{seed}.png", (90, 90, 90), seed)
    data = load_folder(tmp_path, 8)
    assert (len(data.train), len(data.test), data.classes) == (6, 4, ["a", "b"])
    (tmp_path / "val" / "b").rename(tmp_path / "val" / "c")
    with pytest.raises(InputError, match="same classes, got only in one: b, c"):
        load_folder(tmp_path, 8)


def test_digits_split_is_stratified() -> None:
    data = load_digits()
    assert data.train.images.shape[1:] == (3, 16, 16)
    assert len(data.train) + len(data.test) == 1797
    total = torch.bincount(torch.cat([data.train.labels, data.test.labels]))
    assert ((torch.bincount(data.test.labels) / total - 0.2).abs() < 0.01).all()
    assert data.train.images.min() >= 0 and data.train.images.max() <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_digits_loss_falls(tmp_path: Path, dtype: str) -> None:
    result = train(tiny(tmp_path / "out", batch=32, lr=0.2, dtype=dtype), progress=False)
    assert result.history[0]["test_loss"] < 2.2  # chance is ln 10 = 2.30


def test_memory_modes_give_the_same_bits(pictures: Path, tmp_path: Path) -> None:
    for memory in ("balanced", "min", "plain"):
        train(tiny(tmp_path / memory, data=str(pictures), memory=memory), progress=False)
    assert_same_weights(tmp_path / "balanced", tmp_path / "min")
    plain = weights(tmp_path / "plain")
    for name, value in weights(tmp_path / "balanced").items():
        torch.testing.assert_close(value, plain[name], rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("fractalnet", {"columns": 2, "widths": [4, 4]}),
        ("highway_cifar", {}),
        ("highway_mlp", {"depth": 10, "in_features": 192}),
        ("preresnet_cifar", {"depth": 8}),
        ("resnet_cifar", {"depth": 8, "survival": 0.5, "mode": "sample", "scale": "train"}),
        ("resnet_in_resnet", {"width": 2}),
        ("stochastic_depth_cifar", {"depth": 14}),
    ],
)
def test_models_without_dense_blocks(pictures: Path, tmp_path: Path, model: str, arguments: dict[str, Any]) -> None:
    config = tiny(tmp_path / "out", data=str(pictures), model=model, model_kwargs=arguments)
    result = train(config, progress=False)
    assert np.isfinite(result.history[0]["test_loss"])
    with pytest.raises(InputError, match=f"expected memory to be balanced for {model}, which has no dense blocks"):
        train(dataclasses.replace(config, memory="min", out=tmp_path / "other"), progress=False)


def test_gates_follow_the_seed_of_a_run(pictures: Path, tmp_path: Path) -> None:
    whole = tiny(
        tmp_path / "whole", data=str(pictures), model="stochastic_depth_cifar", model_kwargs={"depth": 14}, epochs=3
    )
    train(whole, progress=False)
    torch.manual_seed(99)  # must not matter
    again = dataclasses.replace(whole, out=tmp_path / "again")
    train(again, progress=False)
    assert_same_weights(whole.out, again.out)


def test_augmentation_moves_and_mirrors() -> None:
    image = torch.arange(1.0, 17).view(1, 1, 4, 4)
    moved = augment(image, torch.tensor([[1, -1]]), torch.tensor([False]))[0, 0]
    assert torch.equal(moved[1:, :3], image[0, 0, :3, 1:])
    assert not moved[0].any() and not moved[:, 3].any()
    mirrored = augment(image, torch.tensor([[0, 0]]), torch.tensor([True]))
    assert torch.equal(mirrored, image.flip(3))


def test_plan_is_a_function_of_seed_and_epoch() -> None:
    data = load_digits()
    first, again, other = plan_epoch(data, 0, 1), plan_epoch(data, 0, 1), plan_epoch(data, 0, 2)
    assert torch.equal(first.order, again.order) and torch.equal(first.shifts, again.shifts)
    assert not torch.equal(first.order, other.order)
    assert torch.equal(first.order.sort().values, torch.arange(len(data.train)))
    assert first.shifts.abs().max() == 2 and not first.flips.any()


def test_learning_rate_falls_by_steps() -> None:
    """The published schedule of CIFAR: 300 epochs, a tenth from 150 on, a hundredth from 225 on."""
    rates = [learning_rate(epoch, 300, 0.1, "steps") for epoch in range(300)]
    assert rates == pytest.approx([0.1] * 150 + [0.01] * 75 + [0.001] * 75)


def test_learning_rate_falls_to_zero() -> None:
    rates = [learning_rate(step, 10, 0.1) for step in range(11)]
    assert rates[0] == 0.1 and rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"lr": float("nan")},
        {"schedule": "linear"},
        {"momentum": 1.0},
        {"memory": "max"},
        {"dtype": "int8"},
        {"seed": -1},
        {"resume": True, "fresh": True},
    ],
)
def test_bad_values_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="train: expected"):
        tiny(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "lenet"},
        {"model_kwargs": {"num_classes": 3}},
        {"model_kwargs": {"depth": 11}},
        {"device": "abacus"},
        {"model": "densenet121", "model_kwargs": {}, "size": 8},
    ],
)
def test_bad_models_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="train: expected"):
        train(tiny(tmp_path, **changes), progress=False)


def test_a_model_that_does_not_classify_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(model="fc_densenet56", model_kwargs={}, data="digits", size=32, out=tmp_path / "out")
    with pytest.raises(InputError, match="train: expected a model that classifies images, got fc_densenet56"):
        train(config, progress=False)

# SPDX-License-Identifier: Apache-2.0
"""Training: the loop, what it writes, and that it survives a kill at any moment."""

import csv
import dataclasses
import json
import random
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdense._support import InputError
from fastdense.cli import main
from fastdense.train import TrainConfig, checkpoint, train
from fastdense.train.loop import learning_rate
from tests.cases.training import (
    assert_same_weights,
    command,
    fastdense_lines,
    finished,
    red_and_blue,
    timeless,
    tiny,
    weights,
)

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


# Trains with the JSON on the command line in one fork after the other, each of which dies by SIGKILL some time later;
# its workers are left to themselves, as after a kill by the system.
KILLED_AT_RANDOM = """
import json, os, signal, sys, time
from pathlib import Path
import PIL.Image, PIL.ImageOps, torch, tqdm
import torch._dynamo, torchvision.transforms.v2
from fastdense.train import TrainConfig, train

fields, moments = json.loads(sys.argv[1])
config = TrainConfig(**{**fields, "out": Path(fields["out"])})
path = config.out / "checkpoint.pt"

def stamp():
    return path.exists() and path.stat().st_mtime_ns

for moment in moments:
    child = os.fork()
    if not child:
        train(config, progress=False)
        os._exit(0)
    changes, moment = divmod(moment, 1)  # whole steps to wait for, and then a part of one
    before = stamp()
    while changes and not os.waitpid(child, os.WNOHANG)[0]:
        time.sleep(0.001)
        if stamp() != before:
            before, changes = stamp(), changes - 1
    time.sleep(moment * 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(torch.load(path, weights_only=True)["progress"]["step"] if path.exists() else 0, flush=True)
"""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return red_and_blue(tmp_path / "pictures")


@pytest.fixture
def trained(tmp_path: Path) -> TrainConfig:
    return finished(tmp_path)


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
    assert timeless(result.history) == timeless(expected.history)
    assert not list(config.out.glob(".*"))


def rich(out: Path, pictures: Path, **changes: Any) -> TrainConfig:
    """Everything that has a state: dropout, crops, averages, warm-up, many steps, a picture that is broken."""
    whole = (pictures / "red" / "0.png").read_bytes()
    (pictures / "red" / "broken.png").write_bytes(whole[: len(whole) // 2])
    fields: dict[str, Any] = {
        "model_kwargs": {"depth": 10, "growth_rate": 4, "drop_rate": 0.2},
        "data": str(pictures),
        "augment": "crop",
        "batch": 3,
        "epochs": 3,
        "ema": 0.9,
        "warmup": 0.5,
        "label_smoothing": 0.1,
        "resume": True,
        "checkpoint_seconds": 0,
    }
    return tiny(out, **{**fields, **changes})


def test_runs_with_workers_killed_at_random_moments_end_with_the_same_bits(pictures: Path, tmp_path: Path) -> None:
    expected = train(rich(tmp_path / "whole", pictures, checkpoint_seconds=1e9), progress=False)
    config = rich(tmp_path / "killed", pictures, workers=2)
    moments = [6 * random.random() for _ in range(6)]  # of 33 steps
    job = json.dumps([{**dataclasses.asdict(config), "out": str(config.out)}, moments])
    child = subprocess.run([sys.executable, "-c", KILLED_AT_RANDOM, job], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    steps = [int(line) for line in child.stdout.split()]
    assert steps == sorted(steps) and len(set(steps)) > 1, steps  # else the moments are no good
    result = train(config, progress=False)
    assert_same_weights(tmp_path / "whole", config.out)
    assert timeless(result.history) == timeless(expected.history)
    metrics = json.loads((config.out / "metrics.json").read_text())
    assert len(metrics["skipped"]) == 1 and "broken.png" in metrics["skipped"][0]


def test_any_number_of_workers_may_go_on(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of each epoch and in its evaluation, and resumed by another number of workers."""
    train(rich(tmp_path / "whole", pictures, workers=2), progress=False)
    save = checkpoint.save
    written = 0

    def stop(path: Path, state: dict[str, Any]) -> None:
        nonlocal written
        save(path, state)
        written += 1
        if written % 8 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", stop)
    stops = 0
    for workers in (0, 1, 0, 2, 0, 0, 0):
        try:
            train(rich(tmp_path / "stopped", pictures, workers=workers), progress=False)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == 4 and written == 33
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_existing_checkpoint_asks_for_resume_or_fresh(trained: TrainConfig) -> None:
    with pytest.raises(InputError, match="--resume, or start anew with --fresh"):
        train(trained, progress=False)
    before = weights(trained.out)
    train(dataclasses.replace(trained, fresh=True, seed=1), progress=False)
    assert not torch.equal(weights(trained.out)["classifier.weight"], before["classifier.weight"])


def test_resuming_what_never_began_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path / "new", resume=True)
    begun = train(config, progress=False)
    words = f"fastdense: no checkpoint {config.out / 'checkpoint.pt'} to resume: the run starts from the beginning"
    assert words in capsys.readouterr().err
    assert train(config, progress=False).history == begun.history
    assert words not in capsys.readouterr().err


def test_resuming_a_finished_run_reports_it_again(trained: TrainConfig) -> None:
    first = json.loads((trained.out / "metrics.json").read_text())
    result = train(dataclasses.replace(trained, resume=True), progress=False)
    assert result.history == first["history"]


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
        *("config", "versions", "classes", "size", "mean", "std", "images", "skipped", "parameters"),
        *("test_accuracy", "history"),
    }
    assert metrics["classes"] == ["blue", "red"]
    assert metrics["images"] == {"train": 32, "test": 8, "skipped": 0}
    assert [entry["epoch"] for entry in metrics["history"]] == [1, 2]
    keys = ["epoch", "loss", "accuracy", "test_loss", "test_accuracy", "lr", "seconds", "waiting", "limit"]
    assert all(list(entry) == keys for entry in metrics["history"])
    with open(trained.out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{**row, "limit": ""} for row in rows] == [
        {**{key: str(value) for key, value in entry.items()}, "limit": ""} for entry in metrics["history"]
    ]
    with Image.open(trained.out / "curves.png") as picture:
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 1


def test_checkpoint_says_what_its_network_is_for(trained: TrainConfig) -> None:
    data = torch.load(trained.out / "checkpoint.pt", weights_only=True)["data"]
    assert data == {
        "classes": ["blue", "red"],
        "size": 8,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }


def test_the_log_says_what_limits(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def limits(**changes: Any) -> list[str]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        history = train(tiny(out, data=str(pictures), epochs=1, **changes)).history
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch 1/1: loss ")]
        assert len(lines) == 1 and lines[0].endswith(f"{history[0]['limit']} are the limit")
        return [entry["limit"] for entry in history]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdense.train.data.open_rgb", lambda path: time.sleep(0.05) or Image.new("RGB", (12, 14)))
        assert limits() == ["images"]
    with pytest.MonkeyPatch.context() as patch:
        step = torch.optim.SGD.step
        patch.setattr(torch.optim.SGD, "step", lambda self: time.sleep(0.5) or step(self))
        assert limits() == ["steps"]


def test_tensorboard_gets_what_is_in_the_log(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    config = tiny(tmp_path / "out", data=str(pictures), tensorboard=True)
    train(config, progress=False)
    history = train(dataclasses.replace(config, epochs=2, resume=True), progress=False).history
    scalars = [key for key in history[0] if key not in ("epoch", "limit")]
    expected: list[Any] = []
    for entry in history:
        expected += [(str(config.out / "tensorboard"), entry["epoch"])]
        expected += [(key, entry[key], entry["epoch"]) for key in scalars]
    assert written == expected


def test_without_tensorboard_its_option_says_so(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(command(tiny(tmp_path / "out", data=str(pictures)), "--epochs=1", "--tensorboard")) == 2
    (line,) = fastdense_lines(capsys)
    assert "tensorboard to be installed" in line and line.endswith("pip install tensorboard")


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


def test_learning_rate_falls_by_steps() -> None:
    """The published schedule of CIFAR: 300 epochs, a tenth from 150 on, a hundredth from 225 on."""
    rates = [learning_rate(epoch, 300, 0.1, "steps") for epoch in range(300)]
    assert rates == pytest.approx([0.1] * 150 + [0.01] * 75 + [0.001] * 75)


@pytest.mark.parametrize("schedule", ["cosine", "steps"])
def test_learning_rate_warms_up(schedule: str) -> None:
    rates = [learning_rate(step, 20, 1.0, schedule, warmup=4) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    if schedule == "cosine":
        assert rates[4:] == pytest.approx([learning_rate(step, 16, 1.0) for step in range(16)])
    else:
        assert rates[4:] == [learning_rate(step, 20, 1.0, "steps") for step in range(4, 20)]


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
        {"augment": "rotate"},
        {"freeze": True},
        {"warmup": -1.0},
        {"warmup": 1.0},
        {"label_smoothing": 1.0},
        {"ema": 1.0},
        {"workers": -1},
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
    with pytest.raises(InputError, match=r"train: (expected|cannot create)"):
        train(tiny(tmp_path, **changes), progress=False)


def test_a_model_that_does_not_classify_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(model="fc_densenet56", model_kwargs={}, data="digits", size=32, out=tmp_path / "out")
    with pytest.raises(InputError, match="train: expected a model that classifies images, got fc_densenet56"):
        train(config, progress=False)


def test_a_budget_gives_the_weights_of_any_mode(tmp_path, capsys):
    config = tiny(tmp_path / "free")
    train(config, progress=False)
    train(dataclasses.replace(config, out=tmp_path / "fit", budget="1GiB"), progress=False)
    assert "peak" in capsys.readouterr().err
    assert_same_weights(tmp_path / "fit", tmp_path / "free")
    with pytest.raises(InputError, match=r"--budget 1kB: .*not even one image fits"):
        train(dataclasses.replace(config, out=tmp_path / "small", budget="1kB"), progress=False)
    with pytest.raises(InputError, match="budget to be None where memory is given"):
        dataclasses.replace(config, memory="min", budget="1GiB")

# SPDX-License-Identifier: Apache-2.0
"""What a training run does with checkpoints that are damaged, and with losses that are not finite."""

import copy
import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdense._support import InputError
from fastdense.cli import main
from fastdense.train import NonFiniteLossError, TrainConfig, checkpoint, train
from tests.cases.training import command, fastdense_lines, finished, paint, red_and_blue, tiny


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return red_and_blue(tmp_path / "pictures")


@pytest.fixture
def trained(tmp_path: Path) -> TrainConfig:
    return finished(tmp_path)


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
    """A tree with another value, or none, in one place; it shares all else with the one given."""
    tree = copy.copy(tree)
    place = tree
    for key in where[:-1]:
        place[key] = copy.copy(place[key])
        place = place[key]
    if value is REMOVED:
        del place[where[-1]]
    else:
        place[where[-1]] = value
    return tree


def test_edited_checkpoints_are_named(pictures: Path, tmp_path: Path) -> None:
    """Every entry in turn becomes something else, or is gone; in a network of few tensors, which are read each time."""
    few = {"depth": 8, "in_features": 192, "width": 8}
    config = tiny(tmp_path / "out", data=str(pictures), epochs=2, model="highway_mlp", model_kwargs=few)
    train(config, progress=False)
    path = config.out / "checkpoint.pt"
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

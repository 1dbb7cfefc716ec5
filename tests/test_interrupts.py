# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C during commands: what was done is kept, and the command that goes on is printed."""

import itertools
import json
import os
import pkgutil
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from fastdense._support import Interrupted
from fastdense.cli import main
from fastdense.models import load_super_resolution
from fastdense.train import interrupts, train
from tests.cases.training import assert_same_weights, tiny

NET = ["--model", "densenet_cifar", "--depth", "10", "--growth-rate", "4", "--threads", "1"]
TRAINING = ["train", *NET, "--data", "digits", "--size", "8", "--batch", "512", "--epochs", "2"]
BENCH = ["bench", *NET, "--batch", "2", "--size", "16", "--variants", "plain,min"]


def press(monkeypatch: pytest.MonkeyPatch, where: str, call: int) -> None:
    """Sends SIGINT, as the terminal does for Ctrl-C, in the call of that number of a function."""
    owner, _, name = where.rpartition(".")
    home = pkgutil.resolve_name(owner)
    plain, calls = getattr(home, name), itertools.count(1)

    def function(*arguments: object, **named: object) -> object:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments, **named)

    monkeypatch.setattr(home, name, function)


def next_command(text: str) -> list[str]:
    """What is printed to be typed next, without the program's name."""
    assert "Traceback" not in text
    program, *words = shlex.split(text.strip().splitlines()[-1])
    assert program == "fastdense"
    return words


@pytest.mark.parametrize(("function", "call", "step"), [("_train_step", 2, 2), ("_forward", 4, 3)])
def test_training_keeps_the_last_step_and_goes_on(function, call, step, tmp_path, monkeypatch, capsys, one_thread):
    """Pressed in the second step, and while the first epoch is evaluated, which has three steps."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped run"
    assert main([*TRAINING, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        press(patch, f"fastdense.train.loop._Run.{function}", call)
        assert main([*TRAINING, "--fresh", "--out", str(stopped)]) == 130
    text = capsys.readouterr().err
    assert f"fastdense: stopped after step {step} of 6, which {stopped / 'checkpoint.pt'} holds. Go on with:\n" in text
    again = next_command(text)
    assert again == [*TRAINING, "--out", str(stopped), "--resume"]
    assert torch.load(stopped / "checkpoint.pt", weights_only=True)["progress"]["step"] == step
    assert main(again) == 0
    assert_same_weights(whole, stopped)


def test_super_resolution_keeps_the_last_step_and_goes_on(tmp_path, monkeypatch, capsys, one_thread):
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        picture(tmp_path / f"pictures/{number}.png", 40, number)
    options = [
        "train",
        "--task",
        "sr",
        "--data",
        str(tmp_path / "pictures"),
        "--steps",
        "4",
        "--batch",
        "2",
        "--size",
        "12",
    ]
    assert main([*options, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        press(patch, "fastdense.train.super_resolution._Run.step", 3)
        assert main([*options, "--out", str(tmp_path / "stopped")]) == 130
    text = capsys.readouterr().err
    assert f"stopped after step 3 of 4, which {tmp_path / 'stopped/checkpoint.pt'} holds." in text
    assert main(next_command(text)) == 0
    made = [load_super_resolution(tmp_path / name / "model.pt").state_dict() for name in ("whole", "stopped")]
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_a_program_of_its_own_ends_with_130(tmp_path):
    """As a shell sees it: SIGINT to the group of processes, no traceback, exit code 130."""
    command = [sys.executable, "-m", "fastdense", *TRAINING, "--epochs", "10000", "--out", str(tmp_path)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0)
    try:
        deadline = time.monotonic() + 600
        while not (tmp_path / "checkpoint.pt").exists() and time.monotonic() < deadline:  # the end of the first epoch
            time.sleep(0.1)
        os.killpg(running.pid, signal.SIGINT)
        text = running.communicate(timeout=600)[1]
    finally:
        running.kill()
    assert running.returncode == 130, text
    assert "Go on with:" in text and next_command(text)[-1] == "--resume"


def test_the_library_raises_keyboard_interrupt(tmp_path, monkeypatch, one_thread):
    press(monkeypatch, "fastdense.train.loop._Run._train_step", 1)
    with pytest.raises(KeyboardInterrupt) as stop:
        train(tiny(tmp_path), progress=False)
    assert isinstance(stop.value, Interrupted) and stop.value.resumes
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_pressed_twice_it_does_not_wait(monkeypatch):
    with interrupts.deferred() as asked:
        assert not asked.asked
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # at once: torchrun sends another
        assert asked.asked
        monkeypatch.setattr(interrupts, "_SAME_REQUEST", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_of_others_stay():
    def handler(*_: object) -> None:
        pass

    signal.signal(signal.SIGINT, handler)
    try:
        with interrupts.deferred():
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    results = []

    def elsewhere() -> None:
        with interrupts.deferred() as asked:
            results.append(asked.asked)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert results == [False]


@pytest.mark.usefixtures("forked_workers")
def test_bench_shows_and_writes_the_rounds_that_were_timed(tmp_path, monkeypatch, capsys):
    press(monkeypatch, "fastdense.bench.run.Fleet.step_all", 3 + 3)  # three rounds to compare losses, two timed ones
    assert main([*BENCH, "--json", str(tmp_path / "out.json")]) == 130
    out, err = capsys.readouterr()
    assert "time ratio" in out
    assert "fastdense: stopped; 2 of 10 rounds were timed. To measure all:\n" in err
    assert next_command(err) == [*BENCH, "--json", str(tmp_path / "out.json")]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["interrupted"]
    assert [len(row["seconds"]) for row in found["rows"]] == [2, 2]


@pytest.mark.usefixtures("forked_workers")
def test_bench_without_a_timed_round_says_so(monkeypatch, capsys):
    press(monkeypatch, "fastdense.bench.run.Fleet.step_all", 1)
    assert main(BENCH) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\nfastdense: interrupted\n")


@pytest.mark.usefixtures("forked_workers")
def test_sweep_shows_the_depths_that_were_measured(monkeypatch, capsys):
    options = ["bench", "--sweep", "depth", "--depths", "10,16", "--variants", "plain", "--growth-rate", "4"]
    options += ["--size", "16", "--batch", "2", "--threads", "1"]
    press(monkeypatch, "fastdense.bench.sweep._measure", 2)
    assert main(options) == 130
    out, err = capsys.readouterr()
    assert "stopped; 1 of 2 depths were measured. To measure all:" in err and next_command(err) == options
    assert " 10 " in out and " 16 " not in out


def picture(path: Path, side: int, seed: int = 0) -> None:
    samples = numpy.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=numpy.uint8)
    Image.fromarray(samples).save(path)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with three pictures in a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for number in range(3):
        picture(tmp_path / f"in/{number}.png", 40, number)
    return tmp_path


@pytest.mark.parametrize("command", ["resize", "upscale"])
def test_a_folder_of_pictures_goes_on(command, folder, monkeypatch, capsys):
    options = [command, "in", "out", "--scale", "2"]
    with monkeypatch.context() as patch:
        press(patch, "fastdense.cli.images.write_picture", 2)
        assert main(options) == 130
    text = capsys.readouterr().err
    assert "fastdense: stopped; 1 of 3 pictures are in out, each of them whole. Go on with:\n" in text
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["0.png"]
    (folder / "out/0.png").write_bytes(b"as it was")
    assert main(next_command(text)) == 0
    assert f"{command}d 2 of 3 pictures into out; 1 were there already\n" in capsys.readouterr().out
    assert (folder / "out/0.png").read_bytes() == b"as it was"
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["0.png", "1.png", "2.png"]


def test_a_picture_alone_is_whole_or_absent(folder, monkeypatch, capsys):
    press(monkeypatch, "fastdense._support.os.fsync", 1)
    assert main(["resize", "in/0.png", "out.png", "--scale", "2"]) == 130
    assert "fastdense: interrupted" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["in"]


def test_evaluate_shows_and_writes_what_was_measured(folder, monkeypatch, capsys):
    options = ["evaluate", "--data", "in", "--json", "out.json"]
    press(monkeypatch, "fastdense.sr.images.read_bytes", 3)
    assert main(options) == 130
    out, err = capsys.readouterr()
    assert "0.png" in out and "2.png" not in out
    assert "fastdense: stopped; 2 of 3 pictures were measured. To measure all:\n" in err
    assert next_command(err) == options
    found = json.loads((folder / "out.json").read_text())
    assert found["interrupted"] and sorted(found["pictures"]) == ["0.png", "1.png"]


def test_the_demonstration_starts_anew(tmp_path, monkeypatch, capsys):
    options = ["demo", "--out", str(tmp_path), "--threads", "1"]
    monkeypatch.setattr("fastdense.bench.run_bench", lambda *_: (_ for _ in ()).throw(Interrupted("", resumes=False)))
    assert main(options) == 130
    text = capsys.readouterr().err
    assert "stopped. The demonstration starts from the beginning:" in text and next_command(text) == options

# SPDX-License-Identifier: Apache-2.0
"""The command line: help that teaches, errors that say what to do, exit codes."""

import subprocess
import sys

import numpy
import pytest
from PIL import Image

import fastdense
from fastdense.cli import main
from fastdense.cli.commands import make_parser


@pytest.mark.parametrize("command", ["info", "models", "bench", "train", "resize", "upscale", "evaluate", "demo"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "example" in text
    assert f"fastdense {command}" in text


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "densenet121" in text
    assert "vector instructions" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--model", "nope"], "expected --model to be one of"),
        (["bench", "--batch", "0"], "expected --batch to be at least 1"),
        (["bench", "--threads", "-1"], "expected --threads"),
        (["bench", "--sweep", "depth", "--depths", "41"], "6 n \\+ 4"),
        (["train", "--model", "nope"], "expected --model to be one of"),
        (["train", "--data", "no-such-folder"], "no-such-folder"),
    ],
)
def test_input_errors_exit_with_2(arguments, message, capsys, tmp_path):
    import re

    if arguments[0] == "train":
        arguments = [*arguments, "--out", str(tmp_path)]
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("option", [["--variants", "a"], ["--memory-batches", "x"], ["--dtype", "int8"]])
def test_bad_options_exit_with_2(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *option])
    assert stop.value.code == 2


def test_lists_of_numbers():
    options = make_parser().parse_args(["bench", "--memory-batches", "0"])
    assert options.memory_batches == ()
    assert make_parser().parse_args(["bench", "--memory-batches", "2,8"]).memory_batches == (2, 8)


def test_bench_end_to_end(tmp_path, capsys):
    arguments = ["bench", "--model", "densenet_cifar", "--depth", "10", "--growth-rate", "4", "--batch", "2"]
    arguments += ["--size", "16", "--steps", "1", "--memory-batches", "0", "--variants", "plain,min"]
    arguments += ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png"), "--threads", "1"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "time ratio" in text
    assert "min" in text
    assert (tmp_path / "r.json").stat().st_size > 0
    assert (tmp_path / "r.png").stat().st_size > 0


def test_module_and_command_are_the_same():
    help_of = [sys.executable, "-m", "fastdense", "--help"]
    assert "bench" in subprocess.run(help_of, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "x.foo"], "--plot to end in .png, .svg, .pdf, got x.foo"),
        (["--json", "/proc/nothing/x.json"], "--json to be a file that can be written"),
        (["--depth", "11"], "--depth to be of the form 6 n"),
        (["--growth-rate", "0"], "--growth-rate to be at least 1, got 0"),
        (["--memory-batches", "4,4"], "--memory-batches to be two batch sizes"),
        (["--variants", "plain,balanced", "--memory", "min"], "--memory to include balanced of --variants"),
        (["--variants", "plain,min-graph"], "expected min-graph of --variants to run with --device cuda"),
    ],
)
def test_bench_refuses_bad_options_before_it_measures(options, message, capsys):
    assert main(["bench", "--model", "densenet_cifar", *options]) == 2
    assert message in capsys.readouterr().err


def picture(mode: str) -> Image.Image:
    samples = numpy.random.default_rng(0).integers(0, 256, (12, 10, 4), dtype=numpy.uint8)
    if mode == "I;16":
        return Image.fromarray(samples[..., 0].astype(numpy.uint16) * 257)
    return (
        Image.fromarray(samples).convert("RGB").convert(mode) if mode == "P" else Image.fromarray(samples).convert(mode)
    )


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16", "P"])
def test_resize_keeps_the_kind_of_picture(mode, tmp_path, capsys):
    picture(mode).save(tmp_path / "in.png")
    assert main(["resize", f"{tmp_path}/in.png", f"{tmp_path}/out.png", "--scale", "2", "--preset", "matlab"]) == 0
    out = Image.open(tmp_path / "out.png")
    assert out.size == (20, 24)
    assert out.mode == ("RGB" if mode == "P" else mode)
    assert "resized 1 of 1" in capsys.readouterr().out


def test_resize_equals_pillow(tmp_path):
    source = picture("RGB")
    source.save(tmp_path / "in.png")
    assert main(["resize", f"{tmp_path}/in.png", f"{tmp_path}/out.png", "--size", "7x30", "--preset", "pillow"]) == 0
    wanted = source.resize((7, 30), Image.Resampling.BICUBIC)
    assert numpy.array_equal(numpy.asarray(Image.open(tmp_path / "out.png")), numpy.asarray(wanted))


def test_resize_of_a_folder(tmp_path, capsys):
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    picture("RGB").save(folder / "good.png")
    (folder / "corrupt.png").write_bytes(b"nothing")
    assert main(["resize", str(tmp_path / "in"), str(tmp_path / "out"), "--scale", "0.5"]) == 1
    text = capsys.readouterr().out
    assert "corrupt.png" in text and "resized 1 of 2" in text
    assert [path.name for path in (tmp_path / "out" / "deep").iterdir()] == ["good.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["in.png", "out.png"], "exactly one of --scale and --size"),
        (["missing", "out.png", "--scale", "2"], "IN to be a picture or a folder, got missing"),
        (["in.png", "out.xyz", "--scale", "2"], "OUT to end in"),
        (["in.png", "out.png", "--scale", "0.01"], "large enough"),
        (["empty", "out", "--scale", "2"], "IN to hold pictures"),
    ],
)
def test_resize_refuses_bad_input(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture("RGB").save("in.png")
    (tmp_path / "empty").mkdir()
    assert main(["resize", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_models_lists_all(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in fastdense.models.list():
        assert any(line.split()[:1] == [name] for line in lines), name
    (line,) = [line for line in lines if " densenet121 " in f" {line} "]
    assert "7,978,856" in line and "2.83" in line and "1608.06993" in line


def test_train_hands_arguments_to_the_model(tmp_path, capsys):
    options = ["--data", "digits", "--epochs", "1", "--batch", "512", "--out", str(tmp_path / "out")]
    model = ["--model", "fractalnet", "--set", "columns=1", "--set", "widths=(4, 4)"]
    assert main(["train", *model, *options]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert main(["train", *model, "--set", "colums=1", *options, "--fresh"]) == 2
    assert "colums" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["depth", "=3", "1x=3"])
def test_train_refuses_what_is_no_assignment(text, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--set", text])
    assert f"expected NAME=VALUE like depth=20, got {text!r}" in capsys.readouterr().err

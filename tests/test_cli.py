# SPDX-License-Identifier: Apache-2.0
"""The command line: help that teaches, errors that say what to do, exit codes."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy
import pytest
from PIL import Image

import fastdense
from fastdense import _choices
from fastdense.bench import nets
from fastdense.cli import main
from fastdense.cli.commands import make_parser
from fastdense.models import catalogue
from fastdense.ops.bicubic import PRESETS


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
        (["bench", "--timeout", "0"], "expected --timeout to be positive, got 0"),
        (["bench", "--sweep", "depth", "--depths", "41"], "6 n \\+ 4"),
        (["bench", "--depth", "40"], "bench: expected --depth with --model densenet_cifar, got densenet121"),
        (["plan", "--growth-rate", "24"], "plan: expected --growth-rate with --model densenet_cifar, got densenet121"),
        (["plan", "--model", "rrdbnet"], "plan: expected --model to be one of densenet121"),
        (["plan", "--model", "resnet_cifar"], "plan: expected --model to be one of densenet121"),
        (["plan", "--largest-batch", "--batch", "4"], "plan: expected either --batch or --largest-batch, got both"),
        (["plan", "--size", "100000000"], "plan: steps of a few images of 100000000 x 100000000 do not fit"),
        (["plan", "--plot", "x.foo"], "--plot to end in .png, .svg, .pdf, got x.foo"),
        (["plan", "--budget", "150%"], "budget to be at most 100% of the device's memory, got '150%'"),
        (["train", "--model", "nope"], "expected --model to be one of"),
        (
            ["train", "--model", "resnet_cifar", "--depth", "20"],
            "expected --depth with --model densenet_cifar, got resnet_cifar; --set depth=20 is for other models",
        ),
        (["train", "--set", "depth=abc"], "densenet_cifar: expected depth to be a positive integer, got 'abc'"),
        (
            ["train", "--model", "resnet_cifar", "--set", "depth=2.5"],
            "expected depth to be a positive integer, got 2.5",
        ),
        (["train", "--model", "highway_mlp", "--set", "depth=x"], "expected depth to be a positive integer, got 'x'"),
        (["train", "--batch", "0"], "train: expected batch to be at least 1, got 0"),
        (["train", "--data", "no-such-folder"], "no-such-folder"),
        (
            ["train", "--model", "rrdbnet"],
            "rrdbnet, which enlarges pictures: fastdense train --task sr --model rrdbnet tr",
        ),
        (
            ["train", "--task", "sr", "--model", "dpn68"],
            "expected --model of --task sr to be one of drcn, .*, got 'dpn68'",
        ),
    ],
)
def test_input_errors_exit_with_2(arguments, message, capsys, tmp_path):
    if arguments[0] == "train":
        arguments = [*arguments, "--out", str(tmp_path)]
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("option", [["--variants", "a"], ["--memory-batches", "x"], ["--dtype", "int8"]])
def test_bad_options_exit_with_2(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *option])
    assert stop.value.code == 2


@pytest.mark.parametrize("command", ["bench", "plan", "train", "selftest"])
def test_a_device_that_is_not_there(command, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["--out", str(tmp_path)] if command == "train" else []
    assert main([command, "--device", "cuda", *arguments]) == 2
    assert "cuda" in capsys.readouterr().err


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


# --- version, JSON, completion ----------------------------------------------------------------------------------------


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastdense {fastdense.__version__}\n"


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["build"] == fastdense.build_info()
    assert found["models"] == fastdense.models.list()
    assert found["versions"]["torch"] and found["cores"] >= 1


@pytest.mark.parametrize("package", ["rich", "tqdm", "psutil", "PIL"])
def test_info_and_models_need_no_other_package(package, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for arguments in (["info"], ["info", "--json"], ["models"], ["models", "--json"]):
        assert main(arguments) == 0
        assert "densenet121" in capsys.readouterr().out


def test_info_says_how_to_build_for_another_torch(monkeypatch, capsys):
    monkeypatch.setattr("torch.__version__", "9.9.9")
    assert main(["info"]) == 0
    text = capsys.readouterr().err
    assert f"built with torch {fastdense.build_info()['torch']}, but 9.9.9 is installed; build it again:" in text
    assert "-m pip install --no-build-isolation" in text


def test_models_as_json(capsys):
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(found) == fastdense.models.list()
    assert found["densenet121"]["parameters"] == 7_978_856
    assert found["densenet121"]["shape"] == [3, 224, 224]


def test_figures_of_the_models_are_what_is_counted():
    """If this fails because a model has changed: ``python -m fastdense.models.catalogue`` writes the file again."""
    kept = json.loads(catalogue.FILE.read_text())
    assert list(kept) == fastdense.models.list() == sorted(catalogue.CATALOGUE)
    for name, figures in kept.items():
        assert catalogue.describe(name) == figures, name


def test_figures_are_written_again_as_they_are(monkeypatch, tmp_path):
    kept = json.loads(catalogue.FILE.read_text())
    monkeypatch.setattr(catalogue, "describe", kept.get)
    monkeypatch.setattr(catalogue, "FILE", tmp_path / "catalogue.json")
    before = Path(catalogue.__file__).with_suffix(".json").read_text()
    catalogue.main()
    assert (tmp_path / "catalogue.json").read_text() == before


def test_shell_completion_where_argcomplete_is_installed(monkeypatch):
    asked = []
    monkeypatch.setitem(sys.modules, "argcomplete", types.SimpleNamespace(autocomplete=asked.append))
    with pytest.raises(SystemExit):
        main(["--version"])
    assert asked == []
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    with pytest.raises(SystemExit):
        main(["--version"])
    (parser,) = asked
    assert parser.prog == "fastdense"
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0


def test_choices_are_those_of_the_library():
    assert set(_choices.BENCH_VARIANTS) == set(nets.VARIANTS)
    assert set(_choices.PRESET_NAMES) == set(PRESETS)
    assert set(_choices.COMPARED_VARIANTS) | set(_choices.SWEEP_VARIANTS) <= set(nets.VARIANTS)
    assert {variant.memory for variant in nets.VARIANTS.values()} - {None} == set(_choices.DUAL_PATH_MEMORY_MODES)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--budget", "eight"], 'like "8GiB"'),
        (["--variants", "budget"], "needs --budget SIZE"),
        (["--budget", "1GiB", "--mode", "eval"], "and --mode train"),
    ],
)
def test_bench_refuses_a_budget_that_is_none(arguments, message, capsys):
    assert main(["bench", "--model", "densenet_cifar", "--depth", "10", *arguments]) == 2
    assert message in capsys.readouterr().err

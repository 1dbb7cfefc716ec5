# SPDX-License-Identifier: Apache-2.0
"""What setup.py and the Makefile build, and what they say."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

from fastdense.ops import cpu_build

ROOT = Path(__file__).resolve().parents[1]
READ = ("FORCE_CPU", "FORCE_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "DEBUG", "SANITIZE")


def run_setup(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "target"],
        cwd=ROOT,
        env=os.environ | dict.fromkeys(READ, "") | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_setup_without_torch_says_what_to_type(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    result = run_setup(PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr == (
        "fastdense: cannot import torch while building (No module named torch).\n"
        "The build uses the torch that is installed; pip's build isolation hides it. Install torch first,\n"
        "then switch the isolation off:\n"
        "    pip install torch setuptools wheel ninja pybind11\n"
        "    pip install --no-build-isolation .\n"
    )


@pytest.mark.parametrize("version", ["2.10.1", "2.9.1+cu126", "1.13.0a0+git"])
def test_setup_refuses_an_old_torch(tmp_path, version):
    (tmp_path / "torch.py").write_text(f"__version__ = {version!r}")
    result = run_setup(PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr == (
        f"fastdense: needs torch >= 2.11, found {version}.\n"
        "Upgrade torch first, then build again:\n"
        "    pip install --upgrade 'torch>=2.11'\n"
        "    pip install --no-build-isolation .\n"
    )


def test_setup_prints_the_target():
    result = run_setup(FORCE_CPU="1", DEBUG="1")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"torch {torch.__version__}, CPU only, debug\n"


# --- the functions of setup.py ---------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch, tmp_path) -> ModuleType:
    """setup.py on a machine without a GPU whose torch has CUDA, and whose toolkit is where CUDA_HOME says."""
    for name in READ:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for part in ("include/cuda_runtime.h", "bin/nvcc"):
        (tmp_path / "toolkit" / part).parent.mkdir(parents=True)
        (tmp_path / "toolkit" / part).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    return module


def test_a_build_without_a_gpu_is_for_the_cpu_and_says_how_to_get_another(script, tmp_path):
    assert script.find_cuda() is None
    hint = script.cpu_build_hint()
    assert hint == f"fastdense: no GPU is visible: {cpu_build.HINT}"
    assert "FORCE_CUDA=1" in hint


def test_force_cuda_needs_no_gpu(script, monkeypatch, tmp_path):
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert script.find_cuda() == str(tmp_path / "toolkit")
    assert script.cpu_build_hint() is None
    assert script.describe_target() == f"torch {torch.__version__}, CUDA 13.0 for 7.5;8.0;9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert script.describe_target() == f"torch {torch.__version__}, CUDA 13.0 for 9.0"


def test_a_visible_gpu_is_built_for(script, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert script.find_cuda() == str(tmp_path / "toolkit")
    monkeypatch.setenv("FORCE_CPU", "1")
    assert script.find_cuda() is None
    assert script.cpu_build_hint() is None  # somebody asked for it


@pytest.mark.parametrize("visible", [False, True])
def test_a_build_without_a_toolkit_says_what_to_set(script, monkeypatch, tmp_path, visible):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert script.find_cuda() is None
    problem = f"CUDA_HOME={tmp_path} has no include/cuda_runtime.h or no bin/nvcc"
    assert script.cpu_build_hint() == f"fastdense: {problem}: {cpu_build.HINT}"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(script, "is_toolkit", lambda home: False)
    problem = "no CUDA toolkit was found; set CUDA_HOME to one of CUDA 13.0"
    assert script.cpu_build_hint() == f"fastdense: {problem}: {cpu_build.HINT}"


def test_a_torch_without_cuda_needs_no_hint(script, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert script.cpu_build_hint() is None


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"FORCE_CPU": "1"}, "FORCE_CPU is set too"),
        ({"CUDA_HOME": "/none"}, "CUDA_HOME=/none has no include/cuda_runtime.h or no bin/nvcc"),
    ],
)
def test_contradictions_end_the_build(script, monkeypatch, environment, problem):
    for name, value in {"FORCE_CUDA": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"^fastdense: FORCE_CUDA is set, but {problem}.$"):
        script.find_cuda()


def test_force_cuda_with_a_torch_without_cuda_ends_the_build(script, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match=r"FORCE_CUDA is set, but torch .* is built without CUDA"):
        script.find_cuda()


def test_each_target_has_its_own_objects(script, monkeypatch):
    folders = [script.object_folder()]
    for name, value in (("FORCE_CUDA", "1"), ("DEBUG", "1"), ("SANITIZE", "address,undefined")):
        monkeypatch.setenv(name, value)
        folders.append(script.object_folder())
    names = ["cpu", "cuda", "cuda-debug", "cuda-debug-address-undefined"]
    assert folders == [ROOT / "build" / "objects" / name for name in names]


def test_progress_is_a_line_a_file(script, capfd):
    with script.short_progress():
        os.write(1, b"[3/57] ccache c++ -MMD -MF /a/x.o.d -I/a/csrc -c -c '/a b/csrc/x_cpu.cpp' -o '/a b/x.o' -O3\n")
        os.write(1, b"[4/57] nvcc -MD -MF /a/y.o.d -c /a/csrc/y_kernels.cu -o /a/y_kernels.o -D__HALF__\n")
        os.write(1, b"FAILED: /a/y_kernels.o\nnvcc -c /a/csrc/y_kernels.cu -o /a/y_kernels.o\nerror: no")
    os.write(1, b" more")
    assert capfd.readouterr().out == (
        "[3/57] x_cpu.cpp\n[4/57] y_kernels.cu\n"
        "FAILED: /a/y_kernels.o\nnvcc -c /a/csrc/y_kernels.cu -o /a/y_kernels.o\nerror: no more"
    )


def command(script: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch, folder: Path, **sources: str):
    """A command of setup.py for an extension of these C++ sources."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(script, "object_folder", lambda: folder / "objects")
    for stem, text in sources.items():
        (folder / f"{stem}.cpp").write_text(text)
    extension = cpp_extension.CppExtension("tiny", [f"{stem}.cpp" for stem in sources])
    made = getattr(script, name)(setuptools.Distribution({"ext_modules": [extension]}))
    made.build_lib = str(folder / "lib")
    made.ensure_finalized()
    return made


def test_a_build_shows_progress_and_ends_with_the_hint(script, monkeypatch, tmp_path, capfd):
    at_exit = []
    monkeypatch.setattr(script.atexit, "register", lambda *call, **options: at_exit.append((call, options)))
    command(script, "Build", monkeypatch, tmp_path, one="int one = 1;").run()
    shown = capfd.readouterr()
    assert "[1/1] one.cpp\n" in shown.out
    assert " -c " not in shown.out.partition("[1/1]")[2].splitlines()[0]
    assert f"fastdense: building for torch {torch.__version__}, CPU only\n" in shown.err
    assert at_exit == [((print, script.cpu_build_hint()), {"file": sys.stderr})]
    assert [path.name.partition(".")[0] for path in (tmp_path / "lib").iterdir()] == ["tiny"]


def test_a_failed_build_shows_what_the_compiler_says(script, monkeypatch, tmp_path, capfd):
    failing = command(script, "Build", monkeypatch, tmp_path, wrong="int wrong = ;")
    with pytest.raises(RuntimeError):
        failing.run()
    shown = capfd.readouterr().out
    assert re.search(r"FAILED: .*wrong\.o.*\n.* -c .*wrong\.cpp -o .*\n.*wrong\.cpp:1:13:.* error", shown)


def test_cuda_objects_are_compiled_alone_and_not_linked(script, monkeypatch, tmp_path):
    monkeypatch.setenv("FORCE_CUDA", "1")
    sources = {"front": "int front = ;", "front_cuda": "int back = 1;"}
    command(script, "CudaObjects", monkeypatch, tmp_path, **sources).run()
    assert [path.name for path in (tmp_path / "objects").rglob("*.o")] == ["front_cuda.o"]
    assert not (tmp_path / "lib").exists()


def test_cuda_objects_need_a_toolkit(script, monkeypatch, tmp_path):
    compiling = command(script, "CudaObjects", monkeypatch, tmp_path, front_cuda="int front;")
    with pytest.raises(SystemExit, match="cuda_objects: no GPU is visible; set FORCE_CUDA=1"):
        compiling.run()


# --- make ------------------------------------------------------------------------------------------------------------

PYTHON_STANDING_IN = """#!/bin/sh
case "$*" in
*target) cat wanted ;;
*build_ext*) cat wanted >> built; test ! -e broken ;;
*pytest*) echo "$OMP_NUM_THREADS $ATEN_CPU_CAPABILITY $FASTDENSE_SIMD $*" >> tested; test "$FASTDENSE_SIMD" != avx2 ;;
esac
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    """The Makefile among as much as it looks at."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / ".venv/bin/python"
    for path in (python, tmp_path / "csrc/x.cpp", tmp_path / "requirements/test.txt"):
        path.parent.mkdir(parents=True)
        path.touch()
    python.write_text(PYTHON_STANDING_IN)
    python.chmod(0o755)
    for name in ("setup.py", "pyproject.toml"):
        (tmp_path / name).touch()
    checksum = subprocess.run(["cksum", "requirements/test.txt"], cwd=tmp_path, capture_output=True, text=True).stdout
    (tmp_path / f".venv/.installed-{checksum.split()[0]}").touch()
    return tmp_path


def make(tree: Path, wanted: str) -> tuple[int, list[str]]:
    """Result of ``make build``, and all that has been built until then."""
    (tree / "wanted").write_text(f"{wanted}\n")
    made = subprocess.run(["make", "build"], cwd=tree, capture_output=True, text=True, timeout=60)
    return made.returncode, (tree / "built").read_text().split()


def later(path: Path) -> None:
    """A file that has changed by now, whatever the file system's clock."""
    os.utime(path, (time.time() + 10, time.time() + 10))


def test_make_builds_what_the_resolved_target_asks_for(tree):
    assert make(tree, "cpu") == (0, ["cpu"])
    assert make(tree, "cpu") == (0, ["cpu"])
    assert make(tree, "cuda") == (0, ["cpu", "cuda"])
    assert make(tree, "cuda") == (0, ["cpu", "cuda"])
    assert make(tree, "cpu") == (0, ["cpu", "cuda", "cpu"])


def test_make_builds_after_a_change_and_after_a_failure(tree):
    assert make(tree, "cpu") == (0, ["cpu"])
    later(tree / "csrc/x.cpp")
    (tree / "broken").touch()
    assert make(tree, "cpu") == (2, ["cpu"] * 2)
    (tree / "broken").unlink()
    assert make(tree, "cpu") == (0, ["cpu"] * 3)


# --- CUDA kernels ----------------------------------------------------------------------------------------------------


def test_make_runs_the_tests_as_other_processors_would(tree):
    """All of them, even after one has failed."""
    (tree / "wanted").touch()
    command = ["make", "test-isa", "WORKERS=3"]
    made = subprocess.run(
        command, cwd=tree, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60
    )
    assert made.returncode == 2
    arguments = "-m pytest -n 3 --dist loadfile --durations=15 -q"
    levels = (("avx2", "avx2"), ("default", "baseline"))
    runs = [f"{threads} {aten} {ours} {arguments}" for threads in (1, 2) for aten, ours in levels]
    assert (tree / "tested").read_text().splitlines() == runs

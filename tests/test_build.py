# SPDX-License-Identifier: Apache-2.0
"""What the binary says about itself, and the stub that describes it."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastdense import _C
from tests.cases.simd import LEVELS

ROOT = Path(__file__).resolve().parents[1]


def public_names(module: ModuleType) -> set[str]:
    return {name for name in vars(module) if not name.startswith("_")}


def stub_names(body: list[ast.stmt]) -> set[str]:
    names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names - {"BuildInfo"}


def test_stub_has_the_names_of_the_module():
    stub = ast.parse((ROOT / "fastdense/_C.pyi").read_text())
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    assert stub_names(stub.body) == public_names(_C)
    assert stub_names(classes["scalar"].body) == public_names(_C.scalar)
    fields = [node for node in classes["BuildInfo"].body if isinstance(node, ast.AnnAssign)]
    assert [ast.unparse(field.target) for field in fields] == list(_C.build_info())


def stub_signatures(body: list[ast.stmt]) -> dict[str, str]:
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    return {node.name: f"({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}" for node in functions}


def bound_signatures(module: ModuleType) -> dict[str, str]:
    """From pybind11's docstrings, with what it accepts instead of a type written as that type."""
    found = {}
    for name in public_names(module):
        text = getattr(module, name).__doc__ or ""
        for accepted, written in (
            (r"typing\.Annotated\[(.*?), \"FixedSize\(\d\)\"\]", r"\1"),
            (r"typing\.Supports(Int|Float)( \| typing\.SupportsIndex)?", lambda match: match[1].lower()),
            (r"collections\.abc\.Sequence\[", "list["),
        ):
            text = re.sub(accepted, written, text)
        if text.startswith(f"{name}("):
            found[name] = text.strip().removeprefix(name)
    return found


def test_stub_has_the_signatures_of_the_module():
    stub = ast.parse((ROOT / "fastdense/_C.pyi").read_text()).body
    (scalar,) = (node for node in stub if isinstance(node, ast.ClassDef) and node.name == "scalar")
    assert stub_signatures(scalar.body) == bound_signatures(_C.scalar)
    returns = {"build_info": "() -> BuildInfo"}  # a dict whose fields only the stub names
    assert stub_signatures(stub) == bound_signatures(_C) | returns


def test_build_info():
    info = _C.build_info()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert info["version"] == project["version"]
    assert info["torch"] == torch.__version__
    assert info["cuda"] in (None, torch.version.cuda)
    assert (info["cuda"] is None) == (info["cuda_arch_list"] is None)
    assert info["compiler"].split()[0] in ("GCC", "Clang")
    assert info["simd"] in LEVELS
    assert info["cuda_kernels"] in ("auto", "fused", "library")
    assert isinstance(info["dependent_launch"], bool)
    assert info["threads"] >= 1


# Imports torch once. Each process that it forks loads the extension anew, with other variables in its environment.
LOADING = """
import json, os, sys, tempfile, torch
for line in sys.stdin:
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            os.environ.update(json.loads(line))
            from fastdense import _C
            print(json.dumps(_C.build_info()), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        errors.seek(0)
        print(json.dumps(errors.read().decode()), flush=True)
"""


@pytest.fixture(scope="module")
def loaded_with() -> Iterator[Callable[..., tuple[dict[str, Any], str]]]:
    """What the extension says of itself, and prints, where it is loaded with these variables."""
    command = [sys.executable, "-c", LOADING]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def load(**environment: str) -> tuple[dict[str, Any], str]:
            print(json.dumps(environment), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline()), json.loads(process.stdout.readline())

        yield load
        process.stdin.close()


@pytest.fixture(scope="module")
def machine_level(loaded_with) -> str:
    return loaded_with(FASTDENSE_SIMD="")[0]["simd"]


@pytest.mark.parametrize("name", LEVELS)
def test_environment_lowers_the_simd_level(name, loaded_with, machine_level):
    info, errors = loaded_with(FASTDENSE_SIMD=name)
    assert info["simd"] == min(name, machine_level, key=LEVELS.index)
    assert "FASTDENSE_SIMD" not in errors


def test_unknown_simd_level_in_the_environment_is_named_and_ignored(loaded_with, machine_level):
    info, errors = loaded_with(FASTDENSE_SIMD="sse9")
    assert info["simd"] == machine_level
    assert "fastdense: ignoring FASTDENSE_SIMD=sse9, expected baseline, avx2, avx512, avx512_bf16 or amx" in errors


def test_set_simd_level(machine_level):
    before = _C.build_info()["simd"]
    try:
        available = LEVELS[: LEVELS.index(machine_level) + 1]
        for name in available:
            _C.set_simd_level(name)
            assert _C.build_info()["simd"] == name
        for name in set(LEVELS) - set(available):
            with pytest.raises(ValueError, match=f"at most {available[-1]}, got {name}"):
                _C.set_simd_level(name)
        with pytest.raises(ValueError, match="to be baseline, avx2, avx512, avx512_bf16 or amx, got neon"):
            _C.set_simd_level("neon")
    finally:
        _C.set_simd_level(before)


@pytest.mark.parametrize("name", ["", "auto", "fused", "library"])
def test_environment_chooses_the_cuda_kernels(name, loaded_with):
    info, errors = loaded_with(FASTDENSE_CUDA_KERNELS=name)
    assert info["cuda_kernels"] == (name or "auto")
    assert "FASTDENSE_CUDA_KERNELS" not in errors


def test_unknown_cuda_kernels_in_the_environment_are_named_and_ignored(loaded_with):
    info, errors = loaded_with(FASTDENSE_CUDA_KERNELS="fast")
    assert info["cuda_kernels"] == "auto"
    assert "fastdense: ignoring FASTDENSE_CUDA_KERNELS=fast, expected auto, fused or library" in errors


@pytest.mark.parametrize(("value", "expected"), [("", False), ("0", False), ("1", True), ("yes", False)])
def test_environment_switches_dependent_launches(value, expected, loaded_with):
    """Off unless asked for."""
    info, errors = loaded_with(FASTDENSE_DEPENDENT_LAUNCH=value)
    assert info["dependent_launch"] is expected
    message = "fastdense: ignoring FASTDENSE_DEPENDENT_LAUNCH=yes, expected 0 or 1"
    assert (message in errors) == (value == "yes")


def test_set_cuda_kernels():
    before = _C.build_info()["cuda_kernels"]
    try:
        for name in ("auto", "fused", "library"):
            _C.set_cuda_kernels(name)
            assert _C.build_info()["cuda_kernels"] == name
        with pytest.raises(ValueError, match="to be auto, fused or library, got fast"):
            _C.set_cuda_kernels("fast")
    finally:
        _C.set_cuda_kernels(before)

# SPDX-License-Identifier: Apache-2.0
"""What the binary says about itself, and the stub that describes it."""

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastdense import _C
from tests.cases.simd import LEVELS

ROOT = Path(__file__).resolve().parents[1]


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


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


PRINT_SIMD = ("-c", "import torch; from fastdense import _C; print(_C.build_info()['simd'])")


@functools.cache
def machine_level() -> str:
    return run_python(*PRINT_SIMD, FASTDENSE_SIMD="").stdout.strip()


@pytest.mark.parametrize("name", LEVELS)
def test_environment_lowers_the_simd_level(name):
    result = run_python(*PRINT_SIMD, FASTDENSE_SIMD=name)
    assert result.stdout.strip() == min(name, machine_level(), key=LEVELS.index)
    assert "FASTDENSE_SIMD" not in result.stderr


def test_unknown_simd_level_in_the_environment_is_named_and_ignored():
    result = run_python(*PRINT_SIMD, FASTDENSE_SIMD="sse9")
    assert result.stdout.strip() == machine_level()
    expected = "fastdense: ignoring FASTDENSE_SIMD=sse9, expected baseline, avx2, avx512, avx512_bf16 or amx"
    assert expected in result.stderr


def test_set_simd_level():
    before = _C.build_info()["simd"]
    try:
        available = LEVELS[: LEVELS.index(machine_level()) + 1]
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


PRINT_KERNELS = ("-c", "import torch; from fastdense import _C; print(_C.build_info()['cuda_kernels'])")


@pytest.mark.parametrize("name", ["", "auto", "fused", "library"])
def test_environment_chooses_the_cuda_kernels(name):
    result = run_python(*PRINT_KERNELS, FASTDENSE_CUDA_KERNELS=name)
    assert result.stdout.strip() == (name or "auto")
    assert "FASTDENSE_CUDA_KERNELS" not in result.stderr


def test_unknown_cuda_kernels_in_the_environment_are_named_and_ignored():
    result = run_python(*PRINT_KERNELS, FASTDENSE_CUDA_KERNELS="fast")
    assert result.stdout.strip() == "auto"
    assert "fastdense: ignoring FASTDENSE_CUDA_KERNELS=fast, expected auto, fused or library" in result.stderr


@pytest.mark.parametrize(("value", "expected"), [("", False), ("0", False), ("1", True), ("yes", False)])
def test_environment_switches_dependent_launches(value, expected):
    """Off unless asked for."""
    code = "import torch; from fastdense import _C; print(_C.build_info()['dependent_launch'])"
    result = run_python("-c", code, FASTDENSE_DEPENDENT_LAUNCH=value)
    assert result.stdout.strip() == str(expected)
    message = "fastdense: ignoring FASTDENSE_DEPENDENT_LAUNCH=yes, expected 0 or 1"
    assert (message in result.stderr) == (value == "yes")


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

# SPDX-License-Identifier: Apache-2.0
"""What was built, read without loading it, and what to do where it does not load; imports no torch."""

from __future__ import annotations

import json
import shlex
import sys
import tomllib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from importlib.metadata import Distribution

PACKAGE = Path(__file__).resolve().parent
_NEEDED = "torch>=2.11"
_TOOLS = "setuptools wheel ninja pybind11"


class ExtensionError(ImportError):
    """The compiled module does not load; the message says what was built, what is here, and what to run."""


def find_binary(package: Path = PACKAGE) -> Path | None:
    """The compiled module that this Python would load."""
    return next((path for suffix in EXTENSION_SUFFIXES if (path := package / f"_C{suffix}").is_file()), None)


def read_facts(package: Path = PACKAGE) -> dict[str, Any]:
    """``version``, ``torch``, ``cuda`` and ``cuda_arch_list`` of the build, which setup.py wrote; empty without one."""
    binary = find_binary(package)
    try:
        return json.loads(binary.with_suffix(".json").read_text()) if binary else {}
    except (OSError, ValueError):
        return {}


def version() -> str:
    """The version of the package; that of its sources where nothing is built or installed."""
    built = read_facts().get("version")
    if built:
        return built
    project = PACKAGE.parent / "pyproject.toml"
    if project.is_file():
        return tomllib.loads(project.read_text())["project"]["version"]
    metadata = _metadata()
    return metadata.version if metadata else "0+unknown"


def explain_missing_torch() -> str:
    """What to do where there is no torch at all."""
    return f"fastdense: torch is not installed for {sys.executable}. Run\n    {_python()} -m pip install '{_NEEDED}'"


def explain_missing_build(package: Path = PACKAGE) -> str:
    """What is there instead of a compiled module for this Python, and the commands that build one."""
    where = "the source tree" if _is_source_tree(package.parent) else "the folder"
    others = ", ".join(sorted(path.name for path in package.glob("_C.*.so")))
    here = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    found = f"has {others}, but no compiled module for {here}" if others else "has no compiled module: it was not built"
    lines = [f"fastdense: {where} {package} {found}.", *_shadowed(package), "Build it:"]
    return "\n".join([*lines, *build_commands(None, package)])


def explain(error: ImportError, torch_version: str, torch_cuda: str | None, package: Path = PACKAGE) -> str:
    """What the compiled module that does not load was built with, what is here, and the commands that build one.

    Args:
        error: of the import.
        torch_version: of the torch that is installed.
        torch_cuda: the CUDA version of that torch, None for one without CUDA.
        package: the folder of the package.
    """
    facts = read_facts(package)
    built = _torch_line(facts["torch"], facts["cuda"]) if facts else "unknown, as its .json file is missing"
    again = "Build it again for the torch that is here:"
    if facts.get("cuda") and torch_cuda is None:
        again = (
            f"Install torch {facts['torch']} with CUDA {facts['cuda']}, or build fastdense for the torch that is here:"
        )
    lines = [
        f"fastdense: {find_binary(package)} does not load: {error}",
        f"    built with  {built}",
        f"    here        {_torch_line(torch_version, torch_cuda)}",
        again,
    ]
    return "\n".join([*lines, *build_commands(torch_cuda, package)])


def build_commands(torch_cuda: str | None, package: Path = PACKAGE) -> list[str]:
    """The commands that build fastdense for the torch that is here; for CUDA again if it was."""
    force = "FORCE_CUDA=1 " if read_facts(package).get("cuda") and torch_cuda else ""
    return [
        f"    {_python()} -m pip install {_TOOLS}",
        f"    {force}{_python()} -m pip install --no-build-isolation {_source(package.parent)}",
    ]


def _shadowed(package: Path) -> list[str]:
    """A line about another fastdense that would load, if Python did not find this one first."""
    for folder in map(Path, sys.path):
        other = (folder / "fastdense").resolve()
        if other != package and find_binary(other):
            return [
                f"Python found it before the fastdense that is installed in {other}. To use that one, run from another "
                f"folder than {package.parent}, and without it in PYTHONPATH."
            ]
    return []


def _torch_line(torch_version: str, cuda: str | None) -> str:
    return f"torch {torch_version}, {f'CUDA {cuda}' if cuda else 'CPU only'}"


def _is_source_tree(folder: Path) -> bool:
    return (folder / "setup.py").is_file() and (folder / "csrc").is_dir()


def _source(tree: Path) -> str:
    """What pip is to install: the tree, in place; or for an installed package the folder it came from."""
    if _is_source_tree(tree):
        return f"-e {'.' if tree == Path.cwd() else shlex.quote(str(tree))}"
    folder = _installed_from()
    return f"--force-reinstall --no-deps {shlex.quote(str(folder)) if folder else 'FOLDER  # with the sources'}"


def _installed_from() -> Path | None:
    """The folder of sources that pip installed this package from, if it is still there."""
    metadata = _metadata()
    address = metadata.read_text("direct_url.json") if metadata else None
    parts = urlsplit(json.loads(address)["url"]) if address else None
    folder = Path(unquote(parts.path)) if parts and parts.scheme == "file" else None
    return folder if folder and _is_source_tree(folder) else None


def _metadata() -> Distribution | None:
    from importlib.metadata import PackageNotFoundError, distribution  # slow, and rarely needed

    try:
        return distribution("fastdense")
    except PackageNotFoundError:
        return None


def _python() -> str:
    return shlex.quote(sys.executable or "python")

# SPDX-License-Identifier: Apache-2.0
"""What is released: one version, a whole source distribution, annotated interfaces, the licences of what is used."""

import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastdense

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_version():
    changes = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", changes, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    released = re.fullmatch(r"\[(\S+)\] - (\d{4}-\d\d-\d\d)", headings[1])
    assert fastdense.__version__ == PROJECT["project"]["version"] == released[1]
    assert fastdense.__version__ == importlib.metadata.version("fastdense")
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {released[1]}\ndate-released: {released[2]}\n" in citation


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A folder with setuptools' list of sources, made where no older list can be read again, and a wheel's files."""
    folder = tmp_path_factory.mktemp("packed")
    commands = ["egg_info", "--egg-base", folder, "build_py", "--build-lib", folder / "wheel"]
    made = subprocess.run(
        [sys.executable, "setup.py", "-q", *commands], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert made.returncode == 0, made.stderr
    return folder


def test_source_distribution_is_the_checkout(packed):
    """All files but ignored ones; those of an empty repository around the tree, for it need not be a checkout."""
    sources = (packed / "fastdense.egg-info/SOURCES.txt").read_text().splitlines()
    git = ["git", f"--git-dir={packed / 'git'}"]
    subprocess.run([*git, "init", "-q", "--bare"], check=True)
    listed = [*git, f"--work-tree={ROOT}", "ls-files", "-z", "--others", "--exclude-per-directory=.gitignore"]
    known = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    assert {line for line in sources if ".egg-info/" not in line} == {name for name in known if name} - {"PKG-INFO"}


def test_wheel_holds_the_package_and_its_types(packed):
    """Besides the compiled module."""
    files = {path.relative_to(packed / "wheel").as_posix() for path in (packed / "wheel").rglob("*") if path.is_file()}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastdense").rglob("*.py")}
    assert files == package | {"fastdense/py.typed", "fastdense/_C.pyi", "fastdense/models/catalogue.json"}


# --- interfaces ------------------------------------------------------------------------------------------------------


def functions() -> Iterator[tuple[str, types.FunctionType]]:
    """Public functions, and constructors and public methods of public classes, where fastdense writes them."""
    for package in (fastdense, fastdense.nn, fastdense.ops, fastdense.models):
        for name in package.__all__:
            thing = getattr(package, name)
            if inspect.isfunction(thing):
                yield f"{package.__name__}.{name}", thing
            for method, value in vars(thing).items() if inspect.isclass(thing) else ():
                public = method == "__init__" or not method.startswith("_")
                if public and inspect.isfunction(value) and value.__module__.startswith("fastdense"):
                    yield f"{package.__name__}.{name}.{method}", value


def test_public_functions_are_annotated():
    checked = 0
    for name, function in functions():
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
        bare = [p.name for p in parameters if p.annotation is inspect.Parameter.empty]
        assert not bare and "return" in function.__annotations__, (name, bare)
        checked += 1
    assert checked > 100


def test_public_names_have_docstrings():
    for package in (fastdense, fastdense.nn, fastdense.ops, fastdense.models):
        names = [name for name in package.__all__ if not inspect.getdoc(getattr(package, name))]
        assert not names, package


# --- licences --------------------------------------------------------------------------------------------------------

SPDX = {
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "MIT License": "MIT",
    "Python Software Foundation License": "PSF-2.0",
}


def used() -> set[str]:
    """Names of all packages that the build, the library, its extras and the tests ask for."""
    lines = [line for path in (ROOT / "requirements").glob("*.txt") for line in path.read_text().splitlines()]
    lines += PROJECT["build-system"]["requires"] + PROJECT["project"]["dependencies"]
    lines += [line for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra]
    names = {re.match(r"[\w.-]+", line)[0] for line in lines if line and not line.startswith("#")}
    return names - {"fastdense"}


def stated_licence(package: str) -> str:
    """By the package's metadata: the expression, else the short name, else the classifier."""
    metadata = importlib.metadata.metadata(package)
    short = metadata.get("License", "")
    classifiers = [line for line in metadata.get_all("Classifier", []) if line.startswith("License")]
    named = short if short and len(short) < 40 else classifiers[0].rpartition(" :: ")[2] if classifiers else ""
    return metadata.get("License-Expression") or SPDX.get(named, named)


def listed_licences() -> dict[str, str]:
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "THIRD_PARTY.md").read_text().splitlines()]
    return {row[0]: row[2] for row in rows if len(row) == 3 and row[0] not in ("package", "---")}


def test_third_parties_are_those_used():
    assert set(listed_licences()) == used()


@pytest.mark.parametrize("package", sorted(used()))
def test_third_party_licence(package):
    """As the metadata says it, which may leave the number of a BSD licence's clauses open."""
    stated = stated_licence(package)
    listed = listed_licences()[package]
    assert listed == stated or (stated == "BSD" and listed in ("BSD-2-Clause", "BSD-3-Clause"))

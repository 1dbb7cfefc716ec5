# SPDX-License-Identifier: Apache-2.0
"""What importing fastdense loads, in which order its parts build on each other, and what is said where it fails."""

import ast
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastdense
from fastdense import _C, _build_info
from fastdense._build_info import explain, find_binary, read_facts

PACKAGE = Path(fastdense.__file__).parent
ROOT = PACKAGE.parent

CODE = """
import json, sys
import numpy, torch
before = set(sys.modules)
import fastdense
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def test_no_other_package_is_loaded():
    made = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    loaded = set(json.loads(made.stdout)) - sys.stdlib_module_names
    assert "fastdense" in loaded
    assert loaded <= {"fastdense", "torch", "numpy"}, loaded


# --- the graph of imports --------------------------------------------------------------------------------------------


def module_files() -> dict[str, Path]:
    """Every module of the package by name, the compiled one by its stub."""
    files = {"fastdense._C": PACKAGE / "_C.pyi"}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def import_statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Those of functions too, but not what is for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from import_statements(node)


def imported(name: str, source: str, known: set[str]) -> set[str]:
    """The modules that a module imports, with the packages that Python runs on the way and that are not around it."""
    found = set()
    for node in import_statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{name} has a relative import"
            wholes = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {whole if whole in known else str(node.module) for whole in wholes}
    for target in list(found):
        parents = [target[:at] for at, letter in enumerate(target) if letter == "."]
        found |= {parent for parent in parents if not f"{name}.".startswith(f"{parent}.")}
    return (found & known) - {name}


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The strongly connected components of more than one module."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            new = graph[left.pop()] - seen
            seen |= new
            left += new
        return seen

    reached = {name: reach(name) for name in graph}
    return {frozenset(other for other in graph if other in reached[n] and n in reached[other]) for n in graph} - {
        frozenset()
    }


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    files = module_files()
    return {name: imported(name, path.read_text(), set(files)) for name, path in files.items()}


def test_no_module_imports_itself_through_others(graph):
    assert len(graph) > 80
    assert circles(graph) == set()


def test_circles_are_found():
    known = {"p", "p.a", "p.b", "p.c", "p.sub", "p.sub.d"}
    sources = {
        "p": "from p import a",
        "p.a": "import p.b",
        "p.b": "def f():\n    from p.sub.d import x\n",
        "p.c": "if TYPE_CHECKING:\n    from p import c, b\n",
        "p.sub": "from p.a import y",
        "p.sub.d": "",
    }
    found = circles({name: imported(name, source, known) for name, source in sources.items()})
    assert found == {frozenset({"p.a", "p.b", "p.sub"})}


# Each part may import those before it.
PARTS = ("ops", "plain", "fusion", "nn", "timm", "models", "sr", "bench", "train", "cli")


def test_parts_build_on_those_before(graph):
    def part(name: str) -> int:
        names = name.split(".")
        return PARTS.index(names[1]) if len(names) > 1 and names[1] in PARTS else -1

    parts = {part(name) for name in graph}
    assert parts == set(range(-1, len(PARTS)))
    upwards = {(name, other) for name, others in graph.items() for other in others if part(other) > part(name) > -1}
    assert upwards == set()


# --- the command line without torch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--version"], ["-h"], ["bench", "-h"], ["train", "-h"], ["models"]], ids=str)
@pytest.mark.parametrize("start", ["module", "script"])
def test_help_version_and_models_do_not_load_torch(start, arguments, tmp_path):
    script = tmp_path / "fastdense"
    script.write_text("import sys\nfrom fastdense.cli import main\nsys.exit(main())\n")
    program = ["-m", "fastdense"] if start == "module" else [str(script)]
    command = [sys.executable, "-X", "importtime", *program, *arguments]
    made = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in made.stderr.splitlines()}
    assert "fastdense.cli" in loaded
    assert {name.partition(".")[0] for name in loaded} & {"torch", "numpy", "rich"} == set()
    assert "fastdense" in made.stdout or "densenet121" in made.stdout


def test_commands_load_the_library_when_they_use_it():
    code = "import sys; sys.argv = ['fastdense']; import fastdense; assert 'torch' not in sys.modules; "
    code += "from fastdense import convert; assert fastdense.models.list(); print(fastdense.convert is convert)"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout == "True\n"


# --- a compiled module that does not load ----------------------------------------------------------------------------

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
FACTS = {"version": "0.0.1", "torch": "2.9.1", "cuda": None, "cuda_arch_list": None}
NEEDS_MORE = "extern int of_another_torch; int *address = &of_another_torch;"


def copied_tree(folder: Path, is_source: bool = True) -> Path:
    """The package without what was compiled, in a source tree or in a folder like site-packages."""
    shutil.copytree(PACKAGE, folder / "fastdense", ignore=shutil.ignore_patterns("*.so", "_C*.json", "__pycache__"))
    if is_source:
        (folder / "setup.py").touch()
        (folder / "csrc").mkdir()
    else:  # installed from a wheel, whatever else is installed for this Python
        (folder / "fastdense-0.1.0.dist-info").mkdir()
        (folder / "fastdense-0.1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: fastdense\n")
    return folder


def compile_into(tree: Path, source: str, facts: dict[str, str | None] | None) -> Path:
    """A compiled module made of a line of C."""
    binary = tree / f"fastdense/_C{SUFFIX}"
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", binary]
    subprocess.run(command, input=source, text=True, check=True)
    if facts is not None:
        binary.with_suffix(".json").write_text(json.dumps(facts))
    return binary


def torch_of(folder: Path, version: str, cuda: str | None) -> Path:
    """A folder with a torch that has a version and nothing else."""
    folder.mkdir()
    (folder / "torch.py").write_text(f"__version__ = {version!r}\nclass version:\n    cuda = {cuda!r}\n")
    return folder


def import_error(tree: Path, *paths: Path, cwd: Path | None = None, module: str = "fastdense") -> str:
    """The message of the error when the package of that tree is imported."""
    command = [sys.executable, "-c", f"import {module}"]
    path = ":".join(map(str, (tree, *paths)))
    made = subprocess.run(command, cwd=cwd or tree, env={"PYTHONPATH": path}, capture_output=True, text=True)
    assert made.returncode == 1
    assert "circular import" not in made.stderr
    error = made.stderr.partition("ExtensionError: ")[2]
    assert error, made.stderr
    return error


def commands(error: str) -> list[str]:
    return [line.strip() for line in error.splitlines() if " -m pip " in line]


def test_a_tree_that_was_not_built(tmp_path):
    tree = copied_tree(tmp_path / "a tree")
    error = import_error(tree)
    assert f"the source tree {tree / 'fastdense'} has no compiled module: it was not built." in error
    tools, build = commands(error)
    assert tools == f"{sys.executable} -m pip install setuptools wheel ninja pybind11"
    assert build == f"{sys.executable} -m pip install --no-build-isolation -e ."
    elsewhere = commands(import_error(tree, cwd=tmp_path, module="fastdense.ops.dense_block"))
    assert elsewhere[1] == f"{sys.executable} -m pip install --no-build-isolation -e '{tree}'"


def test_a_tree_in_front_of_an_installed_package(tmp_path):
    tree, installed = copied_tree(tmp_path / "tree"), copied_tree(tmp_path / "site", is_source=False)
    compile_into(installed, "", None)
    error = import_error(tree, installed)
    assert f"Python found it before the fastdense that is installed in {installed / 'fastdense'}." in error


def test_a_build_for_another_python(tmp_path):
    tree = copied_tree(tmp_path)
    (tree / "fastdense/_C.cpython-38-x86_64-linux-gnu.so").touch()
    here = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    assert f"has _C.cpython-38-x86_64-linux-gnu.so, but no compiled module for {here}." in import_error(tree)


def test_a_build_for_another_torch(tmp_path):
    tree = copied_tree(tmp_path)
    binary = compile_into(tree, NEEDS_MORE, FACTS)
    error = import_error(tree)
    assert error.startswith(f"fastdense: {binary} does not load: ")
    assert "undefined symbol: of_another_torch\n    built with  torch 2.9.1, CPU only\n" in error
    here = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    assert f"    here        torch {torch.__version__}, {here}\nBuild it again for the torch that is here:\n" in error
    assert commands(error)[1] == f"{sys.executable} -m pip install --no-build-isolation -e ."


@pytest.mark.parametrize(
    ("built", "here", "expected"),
    [
        ("13.0", None, "Install torch 2.9.1 with CUDA 13.0, or build fastdense for the torch that is here:"),
        ("13.0", "12.8", "Build it again for the torch that is here:"),
        (None, "12.8", "Build it again for the torch that is here:"),
    ],
)
def test_builds_with_and_without_cuda(built, here, expected, tmp_path):
    tree = copied_tree(tmp_path / "site", is_source=False)
    compile_into(tree, NEEDS_MORE, FACTS | {"cuda": built})
    error = import_error(tree, torch_of(tmp_path / "torch", "2.14.1", here))
    words = {cuda: f"CUDA {cuda}" if cuda else "CPU only" for cuda in (built, here)}
    assert f"built with  torch 2.9.1, {words[built]}\n    here        torch 2.14.1, {words[here]}\n{expected}" in error
    *_, build = commands(error)
    assert build.startswith("FORCE_CUDA=1 ") == bool(built and here)
    assert build.endswith("--no-build-isolation --force-reinstall --no-deps FOLDER  # with the sources")


def test_a_build_without_facts_still_says_what_is_wrong(tmp_path):
    tree = copied_tree(tmp_path / "tree")
    (tree / f"fastdense/_C{SUFFIX}").write_text("no library")
    error = import_error(tree, torch_of(tmp_path / "torch", "2.14.1", None))
    assert "does not load" in error and "built with  unknown" in error


def test_an_installed_package_is_built_again_from_its_sources(tmp_path, monkeypatch):
    class Metadata:
        def read_text(self, name: str) -> str | None:
            address = f"file://{tmp_path}/my%20sources"
            return json.dumps({"url": address, "dir_info": {}}) if name == "direct_url.json" else None

    sources = tmp_path / "my sources"
    (sources / "csrc").mkdir(parents=True)
    (sources / "setup.py").touch()
    monkeypatch.setattr(_build_info, "_metadata", Metadata)
    text = explain(ImportError(), "2.14.1", None, tmp_path / "site-packages/fastdense")
    assert commands(text)[1].endswith(f"--force-reinstall --no-deps '{sources}'")


def test_no_torch_at_all(tmp_path):
    tree = copied_tree(tmp_path / "tree")
    compile_into(tree, "", None)
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    error = import_error(tree, tmp_path)
    assert error.startswith(f"fastdense: torch is not installed for {sys.executable}. Run\n")
    assert commands(error) == [f"{sys.executable} -m pip install 'torch>=2.11'"]


def test_a_command_prints_it_without_a_traceback(tmp_path):
    tree = copied_tree(tmp_path)
    made = subprocess.run([sys.executable, "-m", "fastdense", "info"], cwd=tree, env={}, capture_output=True, text=True)
    assert made.returncode == 2
    assert made.stderr.startswith("fastdense: the source tree ") and "Traceback" not in made.stderr


def test_facts_are_those_of_the_compiled_module():
    info = fastdense.build_info()
    assert read_facts() == {name: info[name] for name in ("version", "torch", "cuda", "cuda_arch_list")}
    assert find_binary() == Path(_C.__file__)


def test_needed_torch_is_that_of_the_metadata():
    (needed,) = re.findall(r'"(torch>=[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert needed == _build_info._NEEDED

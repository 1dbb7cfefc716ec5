# SPDX-License-Identifier: Apache-2.0
"""Builds a wheel for each Python out of a source distribution, and tries each in an environment of its own.

    python release/wheels.py dist/fastdense-0.1.0.tar.gz                 every Python found
    python release/wheels.py dist/fastdense-0.1.0.tar.gz python3.12      these

A wheel belongs to one Python and to the torch it was compiled with: the newest that pip finds, or ``--torch``.
``FORCE_CPU``, ``MAX_JOBS`` and the like reach the build. A wheel with CUDA is for compute capability 7.5 to 12.0 and
later, as far as nvcc knows them, unless ``TORCH_CUDA_ARCH_LIST`` says otherwise. Exit code 1 if one failed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SMOKE = Path(__file__).with_name("smoke.py")
NEWEST_MINOR = 20
ARCHITECTURES = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")  # a wheel does not know its GPU
DESCRIBE = """
import ensurepip, pathlib, sys, sysconfig
assert (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists()
print(*sys.version_info[:3], sep=".")
print(sys.executable)
"""
TARGET = "import torch; print(torch.__version__)"
RESULT = "import fastdense; print(fastdense.build_info()['cuda'] or 'CPU only')"


class Row(NamedTuple):
    python: str
    torch: str = "-"
    device: str = "-"
    wheel: str = "-"
    mib: str = "-"
    minutes: str = "-"
    result: str = "passed"


class Failure(Exception):
    """A step that did not work; the message says which."""


def describe(interpreter: str) -> tuple[str, str] | None:
    """Version and real path; None for what is no Python, or lacks ensurepip or the headers."""
    try:
        asked = subprocess.run([interpreter, "-I", "-c", DESCRIBE], capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    version, _, path = asked.stdout.strip().partition("\n")
    return (version, path) if asked.returncode == 0 else None


def find_interpreters(oldest: tuple[int, ...]) -> Iterator[str]:
    """One for each minor version, from PATH or from the folders of pyenv and uv."""
    home = Path.home()
    managed = [Path(os.environ.get("PYENV_ROOT", home / ".pyenv")) / "versions", home / ".local/share/uv/python"]
    for minor in range(oldest[1], NEWEST_MINOR):
        candidates = [shutil.which(f"python3.{minor}")]
        candidates += [str(path) for folder in managed for path in sorted(folder.glob(f"*/bin/python3.{minor}"))]
        yield from [path for path in candidates if path and describe(path)][:1]


def architectures(known: str) -> str:
    """What a wheel is compiled for, by a compiler that knows these: the output of ``nvcc --list-gpu-arch``."""
    chosen = [a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in known.split()]
    return ";".join(chosen) + "+PTX" if chosen else ""


def add_architectures(environment: dict[str, str]) -> None:
    """Sets TORCH_CUDA_ARCH_LIST where it is not set and there is an nvcc."""
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else environment.get("PATH"))
    if nvcc and not environment.get("TORCH_CUDA_ARCH_LIST"):
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        if chosen := architectures(known):
            environment["TORCH_CUDA_ARCH_LIST"] = chosen


def run(step: str, log: Path, *command: object) -> str:
    """Returns what the command printed; all of it goes to the log as well."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    add_architectures(clean)
    made = subprocess.run(
        [str(part) for part in command],
        cwd=log.parent,
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with open(log, "a") as file:
        file.write(f"+ {' '.join(map(str, command))}\n{made.stdout}")
    if made.returncode:
        print(made.stdout[-3000:], file=sys.stderr)
        raise Failure(f"{step} failed")
    return made.stdout.strip()


def environment(folder: Path, interpreter: str, log: Path, *requirements: object) -> Path:
    """A fresh virtual environment; returns its interpreter."""
    run("venv", log, interpreter, "-m", "venv", folder)
    python = folder / "bin/python"
    run("pip install", log, python, "-m", "pip", "install", "--no-compile", *requirements)
    return python


def build(interpreter: str, sdist: Path, torch: str, out: Path, folder: Path) -> Row:
    """Makes one wheel and tries it; `folder` is for what is thrown away."""
    start, log = time.monotonic(), folder / "log.txt"
    known = describe(interpreter)
    if known is None:
        return Row(interpreter, result="no Python with venv and headers")
    row, interpreter = Row(known[0]), known[1]
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    needed = tomllib.loads((source / "pyproject.toml").read_text())["build-system"]["requires"]
    try:
        python = environment(folder / "build", interpreter, log, torch, *needed)
        row = row._replace(torch=run("torch", log, python, "-c", TARGET).splitlines()[-1])
        options = ("--no-build-isolation", "--no-deps", "--no-cache-dir", "--wheel-dir", folder / "wheel")
        run("pip wheel", log, python, "-m", "pip", "wheel", *options, source)
        (wheel,) = (folder / "wheel").glob("*.whl")
        row = row._replace(wheel=wheel.name, mib=f"{wheel.stat().st_size / 2**20:.1f}")
        shutil.rmtree(folder / "build")
        python = environment(folder / "clean", interpreter, log, wheel, f"torch=={row.torch.partition('+')[0]}")
        smoke = shutil.copy(SMOKE, folder)
        run("smoke test", log, python, "-I", smoke)
        row = row._replace(device=run("import", log, python, "-I", "-c", RESULT).splitlines()[-1])
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, out)
    except Failure as failure:
        kept = out / f"failed-{row.python}.log"
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(log, kept)
        row = row._replace(result=f"{failure}, see {kept}")
    return row._replace(minutes=f"{(time.monotonic() - start) / 60:.1f}")


def table(rows: list[Row]) -> str:
    cells = [Row._fields, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(Row._fields))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", type=Path)
    parser.add_argument("interpreters", nargs="*", help="default: one of each version that the project supports")
    parser.add_argument("--torch", default="torch", help='what pip is asked for, e.g. "torch==2.13.0"')
    parser.add_argument("--out", type=Path, default=Path("dist"))
    options = parser.parse_args()
    project = tomllib.loads((SMOKE.parents[1] / "pyproject.toml").read_text())["project"]
    oldest = tuple(map(int, re.findall(r"\d+", project["requires-python"])))
    interpreters = options.interpreters or list(find_interpreters(oldest))
    if not interpreters:
        parser.error(f"found no Python {project['requires-python']} with venv and headers")
    rows = []
    for interpreter in interpreters:
        print(f"{interpreter}: building and trying", flush=True)
        with tempfile.TemporaryDirectory(prefix="fastdense-wheel-") as folder:
            rows.append(build(interpreter, options.sdist.resolve(), options.torch, options.out.resolve(), Path(folder)))
    print(table(rows))
    return int(any(row.result != "passed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())

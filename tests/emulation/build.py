# SPDX-License-Identifier: Apache-2.0
"""Compiles .cu files of csrc/ and what drives them for the host, and loads the result.

Objects are kept in build/emulation under a name made of everything that went into them. Where several processes want
one at once, the first compiles it and the others wait.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "emulation"
TORCH = Path(torch.__file__).parent

FLAGS = ["-std=c++20", "-O1", "-g0", "-ffp-contract=off", "-fPIC", "-DFASTDENSE_EMULATE"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]  # fibers jump between stacks
if sanitizers := os.environ.get(
    "SANITIZE"
):  # as for setup.py; stacks are not watched, since fibers leave them by jumps
    FLAGS += [f"-fsanitize={sanitizers}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "--param=asan-stack=0"]


def build(op: str, plant: tuple[str, str] | None = None) -> ctypes.CDLL:
    """Compiles ``csrc/<op>/<op>_kernels.cu`` with ``<op>_entry.cpp``.

    Args:
        op: the operator's stem.
        plant: a text of the kernel file and the mistake to put in its place.
    """
    kernels = ROOT / "csrc" / op / f"{op}_kernels.cu"
    text = kernels.read_text()
    if plant is not None:
        assert plant[0] in text, f"{kernels.name} no longer contains {plant[0]!r}"
        text = text.replace(*plant)
    return load({kernels: text, HERE / f"{op}_entry.cpp": None})


def build_with_torch(sources: Sequence[str]) -> Path:
    """Compiles sources that use torch's headers; paths start at the repository's root."""
    return link({ROOT / source: None for source in sources}, ["-isystem", str(TORCH / "include")])


def load(sources: dict[Path, str | None]) -> ctypes.CDLL:
    return ctypes.CDLL(str(link(sources)))


def link(sources: dict[Path, str | None], extra: Sequence[str] = ()) -> Path:
    """A library made of files, or of the text given in place of a file's own."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda item: compile_object(*item, extra), sources.items()))
    library = CACHE / f"{digest(*map(str, objects))}.so"
    with alone(library) as missing:
        if missing:
            torch_libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"] if extra else []
            run([*FLAGS, "-shared", *map(str, objects), *torch_libraries], library)
    return library


def compile_object(path: Path, text: str | None, extra: Sequence[str]) -> Path:
    text = path.read_text() if text is None else text
    flags = [*FLAGS, *extra, f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    if path.suffix == ".cpp":
        flags.append("-O2")  # the code between kernels, as it is in use; kernels compile faster without
    headers = sorted(included(text))
    name = f"{path.stem}_{digest(text, *flags, *(h.read_text() for h in headers))}"
    target = CACHE / f"{name}.o"
    with alone(target) as missing:
        if missing:
            source = CACHE / f"{name}.cpp"
            source.write_text(text)
            run([*flags, "-c", str(source)], target)
    return target


@contextlib.contextmanager
def alone(target: Path) -> Iterator[bool]:
    """Whether a file is still to be made; meanwhile other threads and processes that ask wait."""
    if target.exists():
        yield False
        return
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed, also by the end of the process
        yield not target.exists()


def included(text: str, known: set[Path] | None = None) -> set[Path]:
    """The headers of this repository behind a text, through all their includes."""
    known = set() if known is None else known
    for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE):
        header = next((folder / name for folder in (ROOT / "csrc", HERE) if (folder / name).exists()), None)
        if header and header not in known:
            known.add(header)
            included(header.read_text(), known)
    return known


def run(arguments: list[str], target: Path) -> None:
    """Runs the compiler; the target appears as a whole or not at all."""
    partial = target.with_suffix(f".{os.getpid()}")
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # not for the compiler
    subprocess.run([os.environ.get("CXX", "c++"), *arguments, "-o", str(partial)], check=True, env=environment)
    partial.replace(target)


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]

# SPDX-License-Identifier: Apache-2.0
"""Compiles a .cu file of csrc/ for the host and loads it."""

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def build(op: str, folder: Path, plant: tuple[str, str] | None = None) -> ctypes.CDLL:
    """Compiles ``csrc/<op>/<op>_kernels.cu`` with ``<op>_entry.cpp``.

    Args:
        op: the operator's stem.
        folder: where to put the library.
        plant: a text of the kernel file and the mistake to put in its place.
    """
    kernels = (ROOT / "csrc" / op / f"{op}_kernels.cu").read_text()
    if plant is not None:
        assert plant[0] in kernels, f"{op}_kernels.cu no longer contains {plant[0]!r}"
        kernels = kernels.replace(*plant)
    name = hashlib.sha256(kernels.encode()).hexdigest()[:16]
    source, library = folder / f"{op}_{name}.cpp", folder / f"{op}_{name}.so"
    source.write_text(kernels)
    flags = ["-std=c++17", "-O1", "-g0", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-fsanitize=bounds", "-fno-sanitize-recover=bounds"] if os.environ.get("FASTDENSE_SANITIZE") else []
    command = [os.environ.get("CXX", "c++"), *flags, "-DFASTDENSE_EMULATE", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    subprocess.run([*command, str(source), str(HERE / f"{op}_entry.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))

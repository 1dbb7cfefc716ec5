# SPDX-License-Identifier: Apache-2.0
"""Registers and spills of every CUDA kernel: ``python -m benchmarks.ptxas [arch or part of a file's name ...]``.

Compiles each .cu file of csrc/ by nvcc alone, with the flags of setup.py and torch and with warnings as errors. Prints
one line a kernel, over all its types and widths, and ends with an error if any kernel spills.
"""

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("75", "80", "86", "90", "100", "120")
FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Werror=all-warnings", f"-I{ROOT / 'csrc'}", "--resource-usage"]
ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers",
    re.DOTALL,
)


def compile_kernels(source: Path, architectures: list[str]) -> str:
    """What ptxas says about a file."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, *cpp_extension.COMMON_NVCC_FLAGS, *targets]
        command += ["-c", str(source), "-o", str(Path(folder) / "kernels.o")]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return result.stderr


def kernel_name(mangled: str) -> str:
    """The kernel's name, and for a column reduction what it reduces."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"\(anonymous namespace\)::|fastdense::|void ", "", name)
    name = name.partition("(")[0].partition(",")[0]
    return re.sub("(column|set)_reduce_kernel<", "", name).partition("<")[0].strip()


def main() -> int:
    architectures = [word for word in sys.argv[1:] if word.isdigit()] or list(ARCHITECTURES)
    parts = [word for word in sys.argv[1:] if not word.isdigit()] or [""]
    spills = 0
    print("| file, kernel | variants | " + " | ".join(f"sm_{arch}" for arch in architectures) + " |")
    print("| --- " * (2 + len(architectures)) + "|")
    for source in sorted((ROOT / "csrc").rglob("*.cu")):
        if not any(part in source.name for part in parts):
            continue
        registers: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for mangled, arch, _, stores, loads, used in ENTRY.findall(compile_kernels(source, architectures)):
            name = kernel_name(mangled)
            registers[name][arch].append(int(used))
            if int(stores) or int(loads):
                spills += 1
                print(f"sm_{arch} {mangled}: {stores} bytes of spill stores, {loads} of loads", file=sys.stderr)
        for name, by_arch in sorted(registers.items()):
            cells = [f"{min(by_arch[arch])}-{max(by_arch[arch])}" for arch in architectures]
            print(
                f"| {source.stem}, {name} | {len(by_arch[architectures[0]])} | " + " | ".join(cells) + " |", flush=True
            )
    print(f"kernels that spill: {spills}")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())

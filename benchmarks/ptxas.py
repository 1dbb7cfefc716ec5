# SPDX-License-Identifier: Apache-2.0
"""Registers and spills of every CUDA kernel: ``python -m benchmarks.ptxas [arch or part of a file's name ...]``.

Compiles each .cu file of csrc/ by nvcc alone, with the flags of setup.py and torch and with warnings as errors. Prints
one line a kernel, over all its types and widths, and ends with an error if any kernel spills. From compute capability
9.0 on, kernels must wait for those before them ahead of every access to memory, see csrc/cuda/launch.h: the PTX is
searched for any that does not.
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

# Asks whether there is code for a GPU, and is started nowhere.
NEVER_STARTED = "probe_kernel"
WAIT, START = "griddepcontrol.wait;", "griddepcontrol.launch_dependents;"
ACCESS = re.compile(r"\b(ld|st|atom|red)\.(volatile\.)?global\b|\bcp\.async\.c[ag]\b|^\s*\$L", re.MULTILINE)


def late_waits(ptx: str) -> list[str]:
    """The kernels that access memory, or may jump, before they wait, or let others start before that."""
    late = []
    for kernel in ptx.split(".entry ")[1:]:
        name = kernel.partition("(")[0].strip()
        wait, start, access = kernel.find(WAIT), kernel.find(START), ACCESS.search(kernel)
        waits_first = 0 <= wait < start and (access is None or wait < access.start())
        if NEVER_STARTED not in name and not waits_first:
            late.append(name)
    return late


def ptx_of(source: Path, arch: str) -> str:
    """What nvcc makes of a file for an architecture."""
    flags = [flag for flag in FLAGS if flag != "--resource-usage"] + cpp_extension.COMMON_NVCC_FLAGS
    command = ["nvcc", *flags, "-ptx", f"-arch=compute_{arch}", str(source), "-o", "-"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return result.stdout


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
    spills = late = 0
    print("| file, kernel | variants | " + " | ".join(f"sm_{arch}" for arch in architectures) + " |")
    print("| --- " * (2 + len(architectures)) + "|")
    for source in sorted((ROOT / "csrc").rglob("*.cu")):
        if not any(part in source.name for part in parts):
            continue
        for arch in [arch for arch in architectures if int(arch) >= 90][:1]:
            found = late_waits(ptx_of(source, arch))
            late += len(found)
            print(
                "".join(f"sm_{arch} {name}: no wait ahead of its accesses\n" for name in found), end="", file=sys.stderr
            )
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
    print(f"kernels that spill: {spills}; that wait too late for those before them: {late}")
    return 1 if spills or late else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Builds the extension fastdense._C; everything declarative is in pyproject.toml.

CUDA is on when torch has it, a toolkit is found, and a GPU is visible or FORCE_CUDA=1 is set.
Environment variables: FORCE_CUDA=1, FORCE_CPU=1, CUDA_HOME, TORCH_CUDA_ARCH_LIST, NVCC_FLAGS,
MAX_JOBS, DEBUG=1, SANITIZE=address,undefined (what GCC's -fsanitize takes; "make sanitize" uses it).

    python setup.py -q build_ext --inplace   builds; one line for each compiled file
    python setup.py -q target                prints what these variables and this machine ask for
    python setup.py -q cuda_objects          compiles the CUDA code alone and links nothing
"""

import atexit
import contextlib
import json
import logging
import os
import re
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

from setuptools import Command, setup

ROOT = Path(__file__).resolve().parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED_TORCH = next(line.removeprefix("torch>=") for line in PROJECT["dependencies"] if line.startswith("torch>="))


def check_torch() -> None:
    """Ends the build where torch is missing or too old."""
    try:
        import torch
    except ImportError as error:
        sys.exit(
            f"fastdense: cannot import torch while building ({error}).\n"
            "The build uses the torch that is installed; pip's build isolation hides it. Install torch first,\n"
            "then switch the isolation off:\n"
            "    pip install torch setuptools wheel ninja pybind11\n"
            "    pip install --no-build-isolation ."
        )
    found, needed = ([int(n) for n in re.findall(r"\d+", v)[:2]] for v in (torch.__version__, NEEDED_TORCH))
    if found < needed:
        sys.exit(
            f"fastdense: needs torch >= {NEEDED_TORCH}, found {torch.__version__}.\n"
            "Upgrade torch first, then build again:\n"
            f"    pip install --upgrade 'torch>={NEEDED_TORCH}'\n"
            "    pip install --no-build-isolation ."
        )


check_torch()

import torch  # noqa: E402

logger = logging.getLogger("torch.utils.cpp_extension")
logger.disabled = True  # it would warn of a toolkit without a GPU, which is no mistake
from torch.utils import cpp_extension  # noqa: E402

logger.disabled = False

TORCH_INCLUDE = Path(torch.__file__).parent / "include"
DEFAULT_ARCH_LIST = "7.5;8.0;9.0+PTX"


def flag(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "off", "no")


def is_toolkit(home: str | None) -> bool:
    parts = ("include/cuda_runtime.h", "bin/nvcc")
    return bool(home) and all((Path(home) / part).exists() for part in parts)


def find_toolkit() -> tuple[str | None, str | None]:
    """The CUDA toolkit, or else what stands in the way of a build with CUDA."""
    chosen = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    # torch takes the folder above whichever nvcc is on PATH; a wrapper script leads it astray.
    candidates = [chosen] if chosen else [cpp_extension.CUDA_HOME, "/usr/local/cuda"]
    if flag("FORCE_CPU"):
        return None, "FORCE_CPU is set too"
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is built without CUDA"
    if toolkit := next(filter(is_toolkit, candidates), None):
        return toolkit, None
    if chosen:
        return None, f"CUDA_HOME={chosen} has no include/cuda_runtime.h or no bin/nvcc"
    return None, f"no CUDA toolkit was found; set CUDA_HOME to one of CUDA {torch.version.cuda}"


def find_cuda() -> str | None:
    """Returns the toolkit to build with, or None for a CPU build; contradictions end the build."""
    toolkit, problem = find_toolkit()
    if problem and flag("FORCE_CUDA"):
        sys.exit(f"fastdense: FORCE_CUDA is set, but {problem}.")
    return toolkit if flag("FORCE_CUDA") or torch.cuda.is_available() else None


def cpu_build_hint() -> str | None:
    """The last line of a CPU build that nobody asked for. The error for a CUDA tensor ends alike."""
    if find_cuda() or flag("FORCE_CPU") or torch.version.cuda is None:
        return None
    reason = find_toolkit()[1] or "no GPU is visible"
    return f"fastdense: {reason}: this build is for the CPU only; to run on a GPU, build again with FORCE_CUDA=1"


def find_arch_list() -> str:
    visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    found = ";".join(f"{major}.{minor}" for major, minor in sorted(visible))
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or found or DEFAULT_ARCH_LIST


# Instruction sets of the CPU kernels: when one is compiled, and what it is made of (csrc/cpu/simd/target.h).
X86 = "defined(__x86_64__)"
TARGETS = {"baseline": ("1", ("BASELINE",)), "avx2": (X86, ("AVX2",)), "avx512": (X86, ("AVX512",))}
BF16_TARGETS = {
    "avx512_bf16": ("defined(FASTDENSE_HAS_AVX512_BF16)", ("AVX512", "PAIRS")),
    "amx": ("defined(FASTDENSE_HAS_AMX)", ("AMX", "AVX512", "PAIRS")),
}
KERNEL_SOURCE = """// Written by setup.py: {impl} for {target}.
#include "{header}"

#if {condition}
#define FASTDENSE_TARGET {target}
{sets}
#include "cpu/simd/target.h"
#include "{impl}"
#include "cpu/simd/target_end.h"
#endif
"""


def write_kernel_sources(csrc: Path, folder: Path) -> set[str]:
    """Writes the files that compile each <op>_kernels_impl.h once for every instruction set."""
    texts = {}
    for impl in csrc.rglob("*_kernels_impl.h"):
        header = impl.with_name(impl.name.replace("_impl.h", ".h"))
        has_bf16_sets = "FASTDENSE_EACH_ISA_BF16" in header.read_text()
        for target, (condition, sets) in (TARGETS | BF16_TARGETS if has_bf16_sets else TARGETS).items():
            texts[folder / f"{header.stem}_{target}.cpp"] = KERNEL_SOURCE.format(
                impl=impl.relative_to(csrc).as_posix(),
                header=header.relative_to(csrc).as_posix(),
                condition=condition,
                target=target,
                sets="\n".join(f"#define FASTDENSE_TARGET_{name}" for name in sets),
            )
    folder.mkdir(parents=True, exist_ok=True)
    for stale in set(folder.glob("*.cpp")) - texts.keys():
        stale.unlink()
    for path, text in texts.items():
        # A file that stays as it is keeps its time: ninja compiles it once.
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    return {str(path) for path in texts}


def describe_target() -> str:
    """What a build would be for; a build for something else is another build."""
    device = f"CUDA {torch.version.cuda} for {find_arch_list()}" if find_cuda() else "CPU only"
    options = (flag("DEBUG") and "debug", os.environ.get("SANITIZE"))
    return ", ".join((f"torch {torch.__version__}", device, *filter(None, options)))


def object_folder() -> Path:
    """Targets do not share objects: one build does not undo another."""
    parts = ["cuda" if find_cuda() else "cpu", *(["debug"] if flag("DEBUG") else [])]
    return ROOT / "build" / "objects" / "-".join([*parts, *re.findall(r"\w+", os.environ.get("SANITIZE", ""))])


def extension() -> cpp_extension.CppExtension:
    cuda, csrc = find_cuda(), Path("csrc")
    sources = {str(path) for path in csrc.rglob("*.cpp") if cuda or not path.stem.endswith("_cuda")}
    sources |= write_kernel_sources(csrc, Path("build", "kernels"))
    macros = {"VERSION": PROJECT["version"], "TORCH_VERSION": torch.__version__}
    if cuda:
        cpp_extension.CUDA_HOME = cuda
        sources |= {str(path) for path in csrc.rglob("*.cu")}
        macros["CUDA_VERSION"] = torch.version.cuda
        macros["CUDA_ARCH_LIST"] = os.environ["TORCH_CUDA_ARCH_LIST"] = find_arch_list()
    host = ["-O0", "-g"] if flag("DEBUG") else ["-O3", "-g0"]
    sanitize = os.environ.get("SANITIZE", "")
    if sanitize:
        # Torch's libraries lack the type information that vptr checks look for.
        host = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
        host += [f"-fsanitize={sanitize}", "-fno-sanitize=vptr"]
    # A ReLU mask recomputed by the backward pass must round as in the forward pass: no fma behind
    # our back, here or below on the device. Traps and errno would block vectorisation without changing a result.
    host += ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fvisibility=hidden"]
    # TORCH_CHECK stores file names: keep this machine's folders out of the binary.
    host += [f"-ffile-prefix-map={path}/=" for path in (ROOT, TORCH_INCLUDE)]
    # at::parallel_for is OpenMP code in a header. Compiled, but not linked, with OpenMP: the calls
    # then find torch's own runtime; a second one would keep a second pool of spinning threads.
    cxx = ["-std=c++20", *host, "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi", f"-isystem{TORCH_INCLUDE}"]
    # GCC's own AVX-512 header starts from registers of undefined content.
    cxx += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    cxx += [f'-DFASTDENSE_{name}="{value}"' for name, value in macros.items()]
    nvcc = ["-std=c++20", host[0], "-fmad=false", f"-Xcompiler={','.join(host)}"]
    nvcc += os.environ.get("NVCC_FLAGS", "").split()
    return (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
        "fastdense._C",
        sorted(sources),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=[f"-fsanitize={sanitize}"] if sanitize else [] if flag("DEBUG") else ["-s"],
    )


@contextlib.contextmanager
def short_progress() -> Iterator[None]:
    """Shortens ninja's "[3/57] command" to "[3/57] file"; the rest, as failed commands and their errors, stays."""
    sys.stdout.flush()
    before = os.dup(1)  # ninja writes to the file descriptor
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(writer)

    def copy() -> None:
        with os.fdopen(reader, "rb") as lines, os.fdopen(os.dup(before), "wb") as out:
            for line in lines:
                out.write(re.sub(rb"^(\[\d+/\d+\]) .* -c (?:.*/)?(.+?)'? -o .*", rb"\1 \2", line))
                out.flush()

    copier = threading.Thread(target=copy)
    copier.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(before, 1)  # the pipe's last writer is gone: the copier ends
        copier.join()
        os.close(before)


def write_facts(binary: Path) -> None:
    """Writes beside the compiled module what it was built with: what fastdense/_build_info.py reads."""
    cuda = find_cuda()
    facts = {
        "version": PROJECT["version"],
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cuda_arch_list": find_arch_list() if cuda else None,
    }
    binary.with_suffix(".json").write_text(json.dumps(facts) + "\n")


class Build(cpp_extension.BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        # ninja decides what is out of date, by headers and flags as well: it is always asked, and
        # finds its last objects even where an editable install names a new temporary folder.
        self.force = True
        self.build_temp = str(object_folder())

    def run(self) -> None:
        print(f"fastdense: building for {describe_target()}", file=sys.stderr, flush=True)
        with short_progress():
            super().run()
        write_facts(Path(self.get_ext_fullpath("fastdense._C")))
        if hint := cpu_build_hint():
            atexit.register(print, hint, file=sys.stderr)  # setuptools may have more to say


class CudaObjects(Build):
    """Compiles what a CPU build leaves out, and links nothing."""

    def run(self) -> None:
        if not find_cuda():
            sys.exit(f"fastdense: cuda_objects: {find_toolkit()[1] or 'no GPU is visible; set FORCE_CUDA=1'}.")
        print(f"fastdense: compiling for {describe_target()}", file=sys.stderr, flush=True)
        with short_progress():
            cpp_extension.BuildExtension.run(self)

    def build_extension(self, ext: cpp_extension.CppExtension) -> None:
        ext.sources = [source for source in ext.sources if source.endswith((".cu", "_cuda.cpp"))]
        self.compiler.link_shared_object = lambda *arguments, **options: None
        super().build_extension(ext)


class Target(Command):
    """Prints what a build would be for."""

    user_options: list[tuple[str, str | None, str]] = []  # noqa: RUF012  (setuptools wants a list)

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        print(describe_target())


setup(ext_modules=[extension()], cmdclass={"build_ext": Build, "cuda_objects": CudaObjects, "target": Target})

# SPDX-License-Identifier: Apache-2.0
"""Builds the extension fastdense._C; everything declarative is in pyproject.toml.

CUDA is on when torch has it and a toolkit is found. Environment variables: FORCE_CUDA=1,
FORCE_CPU=1, CUDA_HOME, TORCH_CUDA_ARCH_LIST, NVCC_FLAGS, MAX_JOBS, DEBUG=1,
SANITIZE=address,undefined (what GCC's -fsanitize takes; "make sanitize" uses it).
"""

import json
import os
import sys
import tomllib
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"fastdense: cannot import torch while building ({error}).\n"
        "It compiles against the installed torch: install that first, then run\n"
        "    pip install --no-build-isolation ."
    )

ROOT = Path(__file__).resolve().parent
TORCH_INCLUDE = Path(torch.__file__).parent / "include"
DEFAULT_ARCH_LIST = "7.5;8.0;9.0+PTX"


def flag(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "off", "no")


def is_toolkit(home: str | None) -> bool:
    parts = ("include/cuda_runtime.h", "bin/nvcc")
    return bool(home) and all((Path(home) / part).exists() for part in parts)


def find_cuda() -> str | None:
    """Returns the toolkit to build with, or None for a CPU build; contradictions end the build."""
    chosen = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    # torch takes the folder above whichever nvcc is on PATH; a wrapper script leads it astray.
    candidates = (chosen, cpp_extension.CUDA_HOME, "/usr/local/cuda")
    problem = None
    if flag("FORCE_CPU"):
        problem = "FORCE_CPU is set too"
    elif torch.version.cuda is None:
        problem = f"torch {torch.__version__} is built without CUDA"
    elif chosen and not is_toolkit(chosen):
        sys.exit(f"fastdense: CUDA_HOME={chosen} has no include/cuda_runtime.h or no bin/nvcc.")
    elif not any(map(is_toolkit, candidates)):
        problem = "no CUDA toolkit was found; set CUDA_HOME"
    if problem and flag("FORCE_CUDA"):
        sys.exit(f"fastdense: FORCE_CUDA is set, but {problem}.")
    return None if problem else next(filter(is_toolkit, candidates))


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


def extension() -> cpp_extension.CppExtension:
    cuda, csrc = find_cuda(), Path("csrc")
    sources = {str(path) for path in csrc.rglob("*.cpp") if cuda or not path.stem.endswith("_cuda")}
    sources |= write_kernel_sources(csrc, Path("build", "kernels"))
    macros = {"VERSION": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]}
    macros["TORCH_VERSION"] = torch.__version__
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
    target = "CUDA {CUDA_VERSION} for {CUDA_ARCH_LIST}".format(**macros) if cuda else "CPU only"
    print(f"fastdense: torch {torch.__version__}, {target}, {len(sources)} sources", file=sys.stderr)
    return (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
        "fastdense._C",
        sorted(sources),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=[f"-fsanitize={sanitize}"] if sanitize else [] if flag("DEBUG") else ["-s"],
    )


def write_facts(binary: Path) -> None:
    """Writes beside the compiled module what it was built with: what fastdense/_build_info.py reads."""
    cuda = find_cuda()
    facts = {
        "version": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
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
        self.build_temp = str(ROOT / "build" / "objects")

    def run(self) -> None:
        super().run()
        write_facts(Path(self.get_ext_fullpath("fastdense._C")))


setup(ext_modules=[extension()], cmdclass={"build_ext": Build})

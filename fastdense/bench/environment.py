# SPDX-License-Identifier: Apache-2.0
"""The hardware and the versions that a result belongs to."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from fastdense._build_info import PACKAGE
from fastdense._extension import build_info

_PACKAGES = ("torch", "torchvision", "numpy", "scikit-image", "pillow")


def describe(threads: int = 0) -> dict[str, object]:
    """Everything a reader needs in order to judge a number: machine, versions, commit.

    Args:
        threads: CPU threads asked for; 0 stands for torch's own choice.
    """
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_gib": round(total_memory_gib(), 1),
        "threads": threads or torch.get_num_threads(),
        "gpus": gpu_names(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "allow_tf32": {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "products": torch.backends.cuda.matmul.allow_tf32,
        },
        "build": build_info(),
        "commit": git_commit(PACKAGE.parent),
    }


def hardware_line(environment: dict[str, object], device: str) -> str:
    """The machine in a few words, e.g. ``AMD EPYC, 2 threads``."""
    gpus = environment["gpus"]
    if device == "cuda" and isinstance(gpus, list) and gpus:
        return str(gpus[0])
    threads = environment["threads"]
    return f"{environment['cpu']}, {threads} thread{'' if threads == 1 else 's'}"


def cpu_name() -> str:
    """The processor's name as the system states it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_memory_gib() -> float:
    """Main memory of the machine in GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def gpu_names() -> list[str]:
    """Names of the CUDA devices torch can use."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit(checkout: Path) -> str | None:
    """The commit of `checkout`, with ``+changes`` when files differ; None outside a checkout.

    A checkout that merely contains the installed package (a virtual environment inside another
    project) does not count.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(checkout), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != checkout:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None

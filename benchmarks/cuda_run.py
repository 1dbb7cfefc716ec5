# SPDX-License-Identifier: Apache-2.0
"""Builds, tests, sanitizes and measures on a machine with a CUDA GPU, in one go.

    python -m benchmarks.cuda_run [--out DIR] [--stages build,test,sanitize,kernels,...]

The stages are build, test, sanitize, kernels, layers, super_resolution, bench and compile.
Every stage goes on where another failed. `DIR` ($OUT, or build/cuda) gets cuda_run.json, and cuda_run.tar.gz with what
each stage printed and the samples of each benchmark. The exit code is 0 when all stages went well.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Against the eager network, and as one replayed graph; batch sizes where launches and where memory count.
VARIANTS = "plain,plain-channels-last,memory-efficient-channels-last,timm,plain-channels-last-graph"
FUSED = "balanced,min,balanced-graph,min-graph"
BENCHES = {
    "densenet121-64": ["--batch", "64", "--variants", f"{VARIANTS},{FUSED}"],
    "densenet121-256": ["--batch", "256", "--variants", f"{VARIANTS},{FUSED}"],
    "densenet121-float32": ["--batch", "64", "--dtype", "float32", "--variants", "plain,plain-channels-last,balanced"],
    "dpn92-128": ["--model", "dpn92", "--batch", "128", "--variants", "plain,plain-channels-last,balanced,min"],
    "cifar-bc100-64": ["--model", "densenet_cifar", "--batch", "64", "--variants", f"{VARIANTS},{FUSED}"],
}
COMPILED = {
    "densenet121-compile-64": ["--batch", "64", "--variants", "plain-channels-last,compile,balanced,balanced-graph"],
    "densenet121-autotune-64": ["--batch", "64", "--variants", "plain-channels-last,compile-max-autotune,balanced"],
}
# Filtered to fastdense's kernels where the tool needs no others to know what is initialised.
SANITIZERS = {
    "memcheck": ["--kernel-name", "kns=fastdense"],
    "racecheck": ["--kernel-name", "kns=fastdense"],
    "initcheck": [],
}
# Small blocks of every kind; each launch takes many times as long under a sanitizer.
SANITIZED_FILES = ["tests/test_dense_block.py", "tests/test_dual_path.py", "tests/test_residual_dense_block.py"]
SANITIZED_FILES += ["tests/test_fused_blocks.py"]
SANITIZED_TESTS = "cuda and (test_parity_of_special_cases or test_low_precision or test_many_norms"
SANITIZED_TESTS += " or test_values_and_gradients or test_every_type_and_alignment or test_every_gradient)"


class Report:
    """What the stages found, written after each of them; ``folder`` is for their files."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = ROOT / "build" / "cuda_run"
        self.stages: dict[str, Any] = {}
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        out.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, command: list[str], **environment: str) -> bool:
        """Runs a command, keeps what it prints, and notes how it ended."""
        start = time.monotonic()
        with open(self.folder / f"{name}.log", "w", encoding="utf-8") as log:
            code = subprocess.run(
                command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
            ).returncode
        last = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        self.note(name, ok=code == 0, code=code, seconds=time.monotonic() - start, last_line=" ".join(last))
        return code == 0

    def note(self, name: str, **values: object) -> None:
        self.stages[name] = values
        print(f"{name}: {values}", flush=True)
        # Without fastdense, which may not be built yet.
        (self.out / "cuda_run.json").write_text(json.dumps({"stages": self.stages}, indent=2), encoding="utf-8")
        with tarfile.open(self.out / "cuda_run.tar.gz", "w:gz") as archive:
            archive.add(self.folder, "cuda_run")


def build(report: Report) -> None:
    report.run("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], FORCE_CUDA="1")


def gpu_tests() -> list[str]:
    """The files with tests for a GPU, whatever else of the tests' requirements is installed."""
    found = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if re.search(r"\bdevice\b|mark\.gpu", text) and not missing_modules(text):
            found.append(str(path.relative_to(ROOT)))
    return found


def missing_modules(text: str) -> set[str]:
    names = {name.partition(".")[0] for name in re.findall(r"^(?:import|from) ([\w.]+)", text, re.MULTILINE)}
    return {name for name in names if name != "tests" and importlib.util.find_spec(name) is None}


def test(report: Report) -> None:
    report.run("test", [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *gpu_tests()])


def sanitize(report: Report) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        report.note("sanitize", ok=False, reason="compute-sanitizer is not on PATH")
        return
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SANITIZED_TESTS]
    for name, filters in SANITIZERS.items():
        command = [tool, "--tool", name, "--error-exitcode", "9", *filters]
        report.run(name, [*command, *tests, *SANITIZED_FILES], PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def kernels(report: Report) -> None:
    """Device time of a training step by kernel, slowest first, and the versions and the GPU."""
    import torch
    import torchvision
    from torch.nn import functional

    import fastdense
    from fastdense.bench.environment import describe

    model = fastdense.convert(torchvision.models.densenet121(weights=None).cuda().to(memory_format=torch.channels_last))
    images = torch.randn(64, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (64,), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(images)
        functional.cross_entropy(logits.float(), labels).backward()

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    found = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    found.sort(key=lambda event: -event.self_device_time_total)
    table = [
        {"kernel": event.key[:120], "launches": event.count, "milliseconds": event.self_device_time_total / 1e3}
        for event in found
    ]
    total = sum(row["milliseconds"] for row in table)
    report.note("kernels", ok=True, environment=describe(), milliseconds=total, kernels=table)


def super_resolution(report: Report) -> None:
    """RRDBNet in float16 from 1024 x 1024 to four times that: time and allocator peak, plain and fused in turns."""
    import torch

    from benchmarks.super_resolution_targets import VARIANTS, infer, make, picture
    from benchmarks.turns import row_of_times, row_of_values
    from fastdense.bench.environment import describe
    from fastdense.bench.memory import MIB

    nets = {variant: make("rrdbnet", 23, variant).cuda().half().eval() for variant in VARIANTS}
    pictures = {variant: picture(net, variant, 1, 1024).cuda().half() for variant, net in nets.items()}

    def run(variant: str) -> torch.Tensor:
        out = infer(nets[variant], pictures[variant], variant)
        torch.cuda.synchronize()
        return out

    expected = run("plain").float()
    peaks, differences = {}, {}
    for variant in VARIANTS:
        differences[variant] = float((run(variant).float() - expected).norm() / expected.norm())
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(variant)
        peaks[variant] = (torch.cuda.max_memory_allocated() - before) / MIB
    if max(differences.values()) > 1e-2:
        return report.note("super_resolution", ok=False, reason=f"results differ: {differences}")
    rows = [
        row_of_times("ms", {variant: functools.partial(run, variant) for variant in VARIANTS}, rounds=10, warm_up=2),
        row_of_values("MiB", peaks),
    ]
    targets = {"ms": 0.7, "MiB": 0.25}  # ratios to the better plain layout
    report.note(
        "super_resolution", ok=True, environment=describe(), differences=differences, rows=rows, targets=targets
    )


def benches(report: Report, chosen: dict[str, list[str]]) -> None:
    common = ["--device", "cuda", "--memory-batches", "16,48", "--steps", "20"]
    for name, options in chosen.items():
        dtype = [] if "--dtype" in options else ["--dtype", "bfloat16"]
        command = [sys.executable, "-m", "fastdense", "bench", *common, *dtype, *options]
        report.run(name, [*command, "--json", str(report.folder / f"{name}.json")])


def layers(report: Report) -> None:
    command = [sys.executable, "-m", "benchmarks.cuda_kernels", "--json", str(report.folder / "layers.json")]
    report.run("layers", command)


STAGES: dict[str, Callable[[Report], None]] = {
    "build": build,
    "test": test,
    "sanitize": sanitize,
    "kernels": kernels,
    "layers": layers,
    "super_resolution": super_resolution,
    "bench": lambda report: benches(report, BENCHES),
    "compile": lambda report: benches(report, COMPILED),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "build" / "cuda")))
    parser.add_argument("--stages", default=",".join(STAGES), help="default: %(default)s")
    options = parser.parse_args()
    names = options.stages.split(",")
    for name in names:
        if name not in STAGES:
            parser.error(f"expected --stages to be from {','.join(STAGES)}, got {name}")
    report = Report(options.out)
    for name in names:
        try:
            STAGES[name](report)
        except Exception as error:  # the other stages still have something to say
            report.note(name, ok=False, reason=f"{type(error).__name__}: {error}")
    return 0 if all(stage["ok"] for stage in report.stages.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""What ``benchmarks.cuda_run`` measures by itself: ``python -m benchmarks.cuda_stages NAME [--json FILE]``.

* ``kernels``: device time of a training step of DenseNet-121 by kernel, at batch 64 in bfloat16, of the plain network,
  also with ``torch.backends.cudnn.benchmark``, and of both paths of fastdense; beside it what ``benchmarks.cuda_model``
  predicts
* ``memory``: the allocator's peak in a training step, per image
* ``super_resolution``: RRDBNet in float16, plain and fused: time and the allocator's peak
* ``bicubic``: 1024 x 1024 to four times that, and the share of a copy's rate
* ``tests``: the tests that need a GPU
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastdense
from benchmarks.cuda_kernels import choices_here, device_times
from benchmarks.cuda_model import milliseconds, network
from fastdense import _C
from fastdense._support import write_json
from fastdense.bench.environment import describe

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
BATCH, PROFILED = 64, 5  # images; steps that are profiled
TRIED = "plain, cuDNN's choices by trial"  # as many training scripts have it
Keep = Callable[[dict[str, Any]], None]  # writes what a stage found so far
# Kernels of the model by parts of the names of those that run; the rest has no prediction of its own.
NAMES = {
    "conv1x1_kernel": "1x1 forward",
    "conv1x1_backward_kernel": "1x1 backward",
    "conv_forward_kernel": "3x3 forward",
    "conv_input_gradient_kernel": "3x3 gradient of z",
    "conv_weight_gradient_kernel": "3x3 gradient of the weight",
    "PoolForward": "stem pool",
    "PoolSums": "stem pool sums",
    "PoolBackward": "stem pool backward",
    "SliceGradient": "slice gradient",
}


def densenet(fused: bool) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.densenet121(weights=None).cuda().to(memory_format=torch.channels_last)
    return fastdense.convert(net) if fused else net


def training_step(net: nn.Module, batch: int) -> Callable[[], None]:
    images = torch.randn(batch, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device="cuda")

    def step() -> None:
        net.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = net(images)
        functional.cross_entropy(logits.float(), labels).backward()

    return step


def kernels(keep: Keep) -> dict[str, Any]:
    predicted = milliseconds(network("densenet121", BATCH, True))
    found: dict[str, Any] = {"variants": {}, "predicted": predicted}
    for name in ("plain", *choices_here(), TRIED):
        is_plain = name in ("plain", TRIED)
        torch.backends.cudnn.benchmark = name == TRIED
        if not is_plain:
            _C.set_cuda_kernels(name)
        times = device_times(training_step(densenet(not is_plain), BATCH), PROFILED)
        rows = [{"kernel": key, "launches": count, "ms": time / 1e3} for key, count, time in times]
        totals = {"ms": sum(row["ms"] for row in rows), "launches": sum(row["launches"] for row in rows)}
        print(f"{name}: {totals}", flush=True)
        found["variants"][name] = totals | {"kernels": rows}
        keep(found)
        torch.cuda.empty_cache()
    if "fused" in found["variants"]:
        found["table"] = compared(predicted, found["variants"]["fused"])
    return found


def compared(predicted: dict[str, float], fused: dict[str, Any]) -> list[dict[str, Any]]:
    """Prints and returns predicted and measured milliseconds of the model's kernels."""
    table = []
    print(f"{'kernel':30} {'predicted':>10} {'measured':>10}")
    for part, name in NAMES.items():
        measured = sum(row["ms"] for row in fused["kernels"] if re.search(rf"\b{part}\b", row["kernel"]))
        table.append({"kernel": name, "predicted": predicted[name], "measured": measured})
        print(f"{name:30} {predicted[name]:10.2f} {measured:10.2f}")
    print(f"{'all':30} {sum(predicted.values()):10.2f} {fused['ms']:10.2f}", flush=True)
    return table


def memory(keep: Keep) -> dict[str, float]:
    """MiB an image, from the peaks at two batch sizes."""
    found = {}
    for name in ("plain", "balanced", "min"):
        net = densenet(False)
        if name != "plain":
            net = fastdense.convert(net, memory=name)  # type: ignore[arg-type]
        peaks = []
        for batch in (16, 48):
            step = training_step(net, batch)
            step()
            torch.cuda.reset_peak_memory_stats()
            step()
            peaks.append(torch.cuda.max_memory_allocated() / MIB)
        found[name] = (peaks[1] - peaks[0]) / 32
        print(f"{name}: {found[name]:.1f} MiB an image", flush=True)
        keep(found)
    return found


def super_resolution(keep: Keep) -> dict[str, Any]:
    from benchmarks.super_resolution_targets import VARIANTS, infer, make, picture
    from benchmarks.turns import row_of_times, row_of_values

    nets = {variant: make("rrdbnet", 23, variant).cuda().half().eval() for variant in VARIANTS}
    pictures = {variant: picture(net, variant, 1, 1024).cuda().half() for variant, net in nets.items()}

    def run(variant: str) -> Tensor:
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
    if not all(difference <= 1e-2 for difference in differences.values()):  # a NaN differs
        raise ValueError(f"results differ: {differences}")
    times = {variant: functools.partial(run, variant) for variant in VARIANTS}
    rows = [row_of_times("ms", times, rounds=10, warm_up=2), row_of_values("MiB", peaks)]
    return {"differences": differences, "rows": rows, "targets": {"ms": 0.7, "MiB": 0.25}}


def device_milliseconds(run: Callable[[], Any], rounds: int = 50) -> float:
    """Of the kernels alone: the host may take longer to start a small one."""
    return sum(microseconds for _, _, microseconds in device_times(run, rounds)) / 1e3


def bicubic(keep: Keep) -> dict[str, Any]:
    """Against a copy that reads and writes as much."""
    picture = torch.rand(1, 3, 1024, 1024, device="cuda")
    ours = device_milliseconds(lambda: fastdense.ops.bicubic_resize(picture, scale_factor=4))
    theirs = device_milliseconds(lambda: functional.interpolate(picture, scale_factor=4, mode="bicubic"))
    moved = picture.numel() * (1 + 16) * 4
    source = torch.empty(moved // 8, device="cuda")
    copy = device_milliseconds(lambda: source.clone())
    found = {"ms": ours, "torch": theirs, "copy": copy, "share": copy / ours}
    print(found, flush=True)
    return found


def missing_modules(text: str) -> set[str]:
    names = {name.partition(".")[0] for name in re.findall(r"^(?:import|from) ([\w.]+)", text, re.MULTILINE)}
    return {name for name in names if name != "tests" and importlib.util.find_spec(name) is None}


def tests(keep: Keep) -> None:
    """Files with tests for a GPU, whatever else of the tests' requirements is installed."""
    import pytest

    files = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if not re.search(r"\bdevice\b|mark\.gpu", text):
            continue
        if missing := missing_modules(text):
            print(f"left out {path.name}, which needs {', '.join(sorted(missing))}", flush=True)
        else:
            files.append(str(path))
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--maxfail=20", "--durations=20"]
    options.append("--continue-on-collection-errors")
    if importlib.util.find_spec("xdist"):
        options += ["-n", "8"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout=100"]
    sys.exit(pytest.main([*options, *files]))


STAGES: dict[str, Callable[[Keep], Any]] = {
    "kernels": kernels,
    "memory": memory,
    "super_resolution": super_resolution,
    "bicubic": bicubic,
    "tests": tests,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    environment = describe()

    def keep(found: dict[str, Any]) -> None:
        if options.json:
            write_json(options.json, {"environment": environment, **found})

    keep(STAGES[options.stage](keep))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Counts what can be counted of the CUDA code without a GPU: ``python -m benchmarks.cuda_counts [--part NAME ...]``.

* ``launches``: kernels that a training step of DenseNet-121 and -201 at batch 64 starts, and a forward pass in eval
  mode at 64, 8 and 1. The host code of the CUDA operators runs on CPU tensors, as in the tests, with launches that do
  nothing. Kernels of torch's libraries are counted by the operators that start them. The optimizer is left out.
* ``sass``: what nvcc makes of the stem's kernels and others that divide, for one architecture: 64-bit divisions in
  loops, widths of loads, instructions of the longest loop for each number that it makes. Needs nvcc, and nvdisasm,
  which comes with torch's triton.
* ``banks``: how often the products of the 3x3 kernels ask a bank of shared memory at once.
* ``model``: the predicted times of ``benchmarks.cuda_model``.
* ``host``: time of the host code of the operators of a training step at batch 2, with launches and products that do
  nothing; memory is that of the host.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import fastdense
from benchmarks.cuda_model import NETWORKS, milliseconds, network
from benchmarks.ptxas import FLAGS, ROOT, kernel_name
from fastdense._support import write_json
from tests.emulation.blocks import emulated_kernels
from tests.emulation.conv_tiles import conv_tile

TARGETS = {
    ("launches", "densenet121", "training step"): 640,
    ("launches", "densenet201", "training step"): 1010,
    ("launches", "densenet121", "eval"): 190,
    ("banks", 56): 1.0,
    ("banks", 28): 1.05,
    ("banks", 14): 1.1,
    ("banks", 7): 1.15,
    ("model", "densenet121", 64): 7.5,
    ("model", "densenet121", 256): 21.0,
    ("host",): 2.5,
}
# An H200: a third of its L2 cache, and eight blocks for each of its multiprocessors.
WORKSPACE, BLOCKS = (50 << 20) // 3, 8 * 132

# Kernels that an operator of torch starts on CUDA; others start none, or call one of these.
LIBRARY = {
    **dict.fromkeys(
        ("mm", "addmm", "bmm", "copy_", "fill_", "zero_", "cat", "add", "add_", "mul", "mul_", "div", "div_"), 1
    ),
    **dict.fromkeys(("sum", "mean", "relu", "relu_", "threshold_backward", "convolution", "index_select", "clamp_"), 1),
    "_foreach_zero_": 1,
    **dict.fromkeys(("_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward"), 1),
    "convolution_backward": 2,  # of its input and of its weight
}


def verdict(value: float, *key: object) -> str:
    target = TARGETS.get(key)  # type: ignore[call-overload]
    return "" if target is None else f"target {target:g}: {'met' if value <= target else 'missed'}"


# ---------------------------------------------------------------------------------------------- launches


@contextlib.contextmanager
def launches_that_do_nothing() -> Iterator[ctypes.CDLL]:
    """The CUDA code in the place of the CPU code, whose operator for inference it lacks; memory stays as it is."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    no_inference = mock.patch("fastdense.fusion.dense_block._infer", return_value=None)
    with no_inference, emulated_kernels(False, WORKSPACE, BLOCKS, "auto") as library:
        torch.utils.deterministic.fill_uninitialized_memory = False
        library.skipped_launches.restype = ctypes.c_char_p
        library.skip_launches(True)
        try:
            yield library
        finally:
            library.skip_launches(False)
            torch.utils.deterministic.fill_uninitialized_memory = filled


def starter(text: str) -> str:
    """What a function that starts kernels starts, from its full name."""
    for argument in ("ColumnReduce", "Reduce", "Functor", "Pool"):
        if found := re.search(rf"\b{argument} = (?:\w+::|\{{anonymous\}}::)*(\w+)", text):
            return found[1]
    if found := re.search(r"const (Conv\w+)Params<\w+(?:::\w+)?>&\), ", text) or re.search(r"(Conv\w+)Params<", text):
        return found[1]
    found = re.search(r"(\w+)\(", text)
    return found[1].removeprefix("launch_") if found else text


def own_launches(library: ctypes.CDLL) -> Counter[str]:
    counts: Counter[str] = Counter()
    for line in library.skipped_launches().decode().splitlines():
        number, _, text = line.partition(" ")
        counts[starter(text)] += int(number)
    library.skip_launches(True)  # from zero
    return counts


def library_launches(run: Callable[[], Any]) -> Counter[str]:
    """Of torch's operators, also of those that are called from C++; what one of them calls is its own affair."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    counts: Counter[str] = Counter()

    def visit(event: Any) -> None:
        name = event.name.removeprefix("aten::")
        if event.name.startswith("aten::") and name in LIBRARY:
            counts[name] += LIBRARY[name]
            return
        for child in event.cpu_children:
            visit(child)

    for event in profile.events():
        if event.cpu_parent is None:
            visit(event)
    return counts


def models(name: str, train: bool) -> nn.Module:
    torch.manual_seed(0)
    plain = torchvision.models.get_model(name, weights=None).to(memory_format=torch.channels_last)
    return fastdense.convert(plain, memory="balanced").train(train)


def step(net: nn.Module, images: Tensor, train: bool) -> Callable[[], Any]:
    labels = torch.zeros(len(images), dtype=torch.long)

    def run() -> None:
        net.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16):
            logits = net(images)
        if train:
            functional.cross_entropy(logits.float(), labels).backward()

    return run


class Launches(NamedTuple):
    network: str
    what: str
    own: Counter[str]
    library: Counter[str]

    @property
    def total(self) -> int:
        return self.own.total() + self.library.total()


def count_launches(name: str, train: bool, batch: int = 64) -> Launches:
    net = models(name, train)
    images = torch.zeros(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    with launches_that_do_nothing() as library:
        run = step(net, images, train)
        run()  # what is made once
        own_launches(library)
        torchs = library_launches(run)
        return Launches(name, "training step" if train else "eval", own_launches(library), torchs)


def launches(found: dict[str, Any]) -> None:
    rows = found["launches"] = []
    counted = [("densenet121", True, 64), ("densenet201", True, 64), *(("densenet121", False, n) for n in (64, 8, 1))]
    for name, train, batch in counted:
        row = count_launches(name, train, batch)
        kernels = ", ".join(f"{key} {n}" for key, n in (row.own + row.library).most_common())
        print(f"launches, {name}, {row.what} at {batch}: {row.total} ({row.own.total()} of this library)", end="  ")
        print(verdict(row.total, "launches", name, row.what))
        print(f"    {kernels}")
        rows.append(
            {"network": name, "what": row.what, "batch": batch, "own": dict(row.own), "library": dict(row.library)}
        )


class OperatorCalls(TorchDispatchMode):
    """Notes the calls of this library's operators, as calls of the emulated ones."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "fastdense":
            name = function._schema.name.split("::")[1]
            emulated = getattr(torch.ops.fastdense_emulated, name).default
            self.calls.append(functools.partial(emulated, *args, **kwargs))
        return function(*args, **kwargs)


def host(found: dict[str, Any]) -> None:
    """The operators of one step alone, called again and again."""
    net = models("densenet121", True)
    images = torch.zeros(2, 3, 224, 224).to(memory_format=torch.channels_last)
    run = step(net, images, True)
    samples = []
    with launches_that_do_nothing() as library:
        run()
        with OperatorCalls() as noted:
            run()
        library.skip_products(True)
        try:
            gc.collect()
            gc.disable()
            with torch.no_grad():  # as in autograd functions
                for _ in range(1020):
                    started = time.perf_counter()
                    for call in noted.calls:
                        call()
                    samples.append(1000 * (time.perf_counter() - started))
        finally:
            gc.enable()
            library.skip_products(False)
    samples = samples[20:]  # the first ones ask the system for memory
    found["host"] = {"milliseconds": statistics.median(samples), "least": min(samples)}
    print(f"host time of the operators: {statistics.median(samples):.2f} ms, at least {min(samples):.2f}", end="  ")
    print(verdict(statistics.median(samples), "host"))


# ---------------------------------------------------------------------------------------------- SASS

# Files whose kernels once divided 64-bit numbers in loops, and what a turn of the longest loop makes: numbers of the
# input, of bfloat16 in whole 16 bytes.
FILES = {
    "norm_relu_max_pool/norm_relu_max_pool_kernels.cu": {"PoolForward": 32, "PoolSums": 32, "PoolBackward": 32},
    "cuda/norm_relu/norm_relu_forward.cu": {},
    "cuda/norm_relu/norm_relu_backward.cu": {},
    "bicubic/bicubic_kernels.cu": {},
}
DIVISION = re.compile(r"__cuda_sm20_(?:div|rem)_[su]64")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)


class Sass(NamedTuple):
    kernel: str
    divisions: int  # of 64 bits, in loops
    loads: Counter[str]
    loop: int  # instructions of the longest loop


def find_tool(name: str) -> str:
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    with contextlib.suppress(ImportError):
        import triton

        folders.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which(name) or next(filter(None, (shutil.which(name, path=f) for f in folders)), None)
    return found or sys.exit(f"cuda_counts: {name} was not found; set CUDA_HOME")


def disassemble(source: str, arch: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        flags = [flag for flag in FLAGS if flag != "--resource-usage"]
        command = [find_tool("nvcc"), *flags, "-cubin", f"-arch=sm_{arch}", str(ROOT / "csrc" / source)]
        subprocess.run([*command, "-o", str(cubin)], check=True)
        return subprocess.run([find_tool("nvdisasm"), str(cubin)], check=True, capture_output=True, text=True).stdout


def read_sass(text: str) -> Iterator[tuple[str, Sass]]:
    """Of every kernel, by its mangled name."""
    for part in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        mangled = re.match(r"[\w$]+", part)[0]  # type: ignore[index]
        # Subroutines follow behind the kernel's own code.
        body = part.split("\t.type\t$")[0].split(".type           $")[0]
        places, labels, jumps, calls = [], {}, [], []
        loads: Counter[str] = Counter()
        waiting: list[str] = []
        for line in body.splitlines():
            if label := re.match(r"^(\.L_\w+):", line):
                waiting.append(label[1])
                continue
            found = INSTRUCTION.match(line)
            if not found:
                continue
            at, instruction = int(found[1], 16), found[2]
            labels.update(dict.fromkeys(waiting, at))
            waiting = []
            places.append(at)
            if jump := re.search(r"\bBRA\S* .*`\((\.L_\w+)\)", instruction):
                jumps.append((at, jump[1]))
            if "CALL" in instruction and DIVISION.search(instruction):
                calls.append(at)
            if load := re.search(r"\bLDG\S*", instruction):
                loads[width_of(load[0])] += 1
        loops = [(labels[to], at) for at, to in jumps if to in labels and labels[to] < at]
        inside = sum(any(begin <= at <= end for begin, end in loops) for at in calls)
        longest = max((sum(begin <= p <= end for p in places) for begin, end in loops), default=0)
        yield mangled, Sass(mangled, inside, loads, longest)


def width_of(load: str) -> str:
    found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", load)
    return {"128": "16 bytes", "64": "8", "U16": "2", "S16": "2", "U8": "1", "S8": "1"}[found[1]] if found else "4"


def sass(found: dict[str, Any], arch: str = "90") -> None:
    rows = found["sass"] = []
    for source, made in FILES.items():
        kernels: dict[str, list[Sass]] = {}
        for mangled, facts in read_sass(disassemble(source, arch)):
            kernels.setdefault(kernel_name(mangled), []).append(facts)
        for name, variants in sorted(kernels.items()):
            divisions = sum(v.divisions for v in variants)
            print(f"sass, {Path(source).stem}, {name}: {len(variants)} variants, {divisions} 64-bit divisions in loops")
            rows.append({"file": source, "kernel": name, "variants": len(variants), "divisions": divisions})
        for mangled, facts in read_sass(disassemble(source, arch)) if made else ():
            for part, numbers in made.items():
                # The instance for bfloat16, eight channels and the 3x3 window of a stem.
                if part in mangled and "bfloat16" in mangled and "Li8E" in mangled and "Li3ELi2ELi1E" in mangled:
                    each = facts.loop / numbers
                    loads = ", ".join(f"{n} of {width}" for width, n in sorted(facts.loads.items()))
                    print(f"    {part}: {facts.loop} instructions a turn, {each:.1f} a number of the input, {loads}")
                    rows.append({"kernel": part, "loop": facts.loop, "each": each, "loads": dict(facts.loads)})


# ---------------------------------------------------------------------------------------------- the rest


def banks(found: dict[str, Any]) -> None:
    found["banks"] = {side: conv_tile(64, side, side).wavefronts() for side in (56, 28, 14, 7)}
    for side, value in found["banks"].items():
        print(f"banks, {side} x {side}: {value:.2f} wavefronts for eight rows  {verdict(value, 'banks', side)}")


def model(found: dict[str, Any]) -> None:
    rows = found["model"] = []
    for name in NETWORKS:
        for batch, train in ((64, True), (256, True), (256, False)):
            times = milliseconds(network(name, batch, train))
            total = sum(times.values())
            what = "training step" if train else "eval"
            print(f"model, {name}, {what}, batch {batch}: {total:.1f} ms", end="  ")
            print(verdict(total, "model", name, batch) if train else "")
            print("    " + ", ".join(f"{kernel} {time:.2f}" for kernel, time in times.items() if time >= 0.05))
            rows.append({"network": name, "what": what, "batch": batch, "ms": times})


PARTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "launches": launches,
    "sass": sass,
    "banks": banks,
    "model": model,
    "host": host,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(max(1, torch.get_num_threads()))
    found: dict[str, Any] = {}
    for name in options.part:
        start = time.monotonic()
        PARTS[name](found)
        print(f"({name}: {time.monotonic() - start:.0f} s)", flush=True)
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()

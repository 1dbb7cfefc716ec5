# SPDX-License-Identifier: Apache-2.0
"""Measures what Python costs in a converted DenseNet-121: ``python -m benchmarks.host_time --json FILE``.

The images are so small, 32 x 32, that operators take as little time as they can: one in eval mode, two for a training
step, since batch norm wants more than one value a channel. One thread. Prints

* the Python calls of a forward pass and of a training step, counted by cProfile,
* the time of both, plain and converted in turns,
* the time that is left where the kernels of this library answer at once with empty results: what is outside them, the
  network's first convolution, its classifier and its ReLU included.
"""

import argparse
import contextlib
import copy
import cProfile
import itertools
import pstats
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdense
from fastdense._support import write_json
from fastdense.bench.environment import describe

TARGETS = {"eval": {"calls": 1500, "ratio": 0.70, "outside": 0.12}, "training step": {"ratio": 0.45}}


class Recorder(TorchDispatchMode):
    """Keeps what this library's operators return, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, list[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "fastdense":
            self.results.setdefault(func.name(), []).append(result)
        return result


def empty_like(result: Any) -> Any:
    if isinstance(result, Tensor):
        return torch.empty_like(result)
    return None if result is None else type(result)(map(empty_like, result))


@contextlib.contextmanager
def without_kernels(run: Callable[[], Any]) -> Iterator[None]:
    """Where the operators of a run return empty tensors of the right shapes, in the order of the run."""
    with Recorder() as recorder:
        run()
    with torch.library._scoped_library("fastdense", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about kernels that are there already
        for name, results in recorder.results.items():
            answers = itertools.cycle(results)
            library.impl(name, lambda *_, answers=answers: empty_like(next(answers)), "CPU", allow_override=True)
        yield


def count_calls(run: Callable[[], Any]) -> int:
    profile = cProfile.Profile()
    profile.enable()
    run()
    profile.disable()
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each run, one round after the other."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if index >= 2:
                samples[name].append(1000 * (time.perf_counter() - start))
    return samples


def forward(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return net(x)

    return run


def training_step(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        net.zero_grad()
        out = net(x)
        out.sum().backward()
        return out.detach()

    return run


def measure(what: str, make: Callable[..., Any], nets: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, Any]:
    # A wrong result is not timed; float32 would tell little where a norm has two values a channel.
    expected, made = (make(copy.deepcopy(net).double(), x.double())() for net in nets.values())
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6)
    runs = {name: make(net, x) for name, net in nets.items()}
    for run in runs.values():
        run()
    calls = {name: count_calls(run) for name, run in runs.items()}
    samples = in_turns(runs, rounds)
    with without_kernels(runs["converted"]):
        samples |= in_turns({"outside": runs["converted"]}, rounds)
    ms = {name: statistics.median(taken) for name, taken in samples.items()}
    ratios = (ours / base for ours, base in zip(samples["converted"], samples["plain"], strict=True))
    return {
        "what": what,
        "calls": calls,
        "ms": ms,
        "ratio": statistics.median(ratios),
        "outside": ms["outside"] / ms["plain"],
        "samples": samples,
    }


def verdict(found: dict[str, Any], name: str) -> str:
    target = TARGETS[found["what"]].get(name)
    value = found["calls"]["converted"] if name == "calls" else found[name]
    return "" if target is None else f"{target:g}: {'met' if value <= target else 'missed'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = torchvision.models.densenet121(weights=None)
    nets = {"plain": plain, "converted": fastdense.convert(copy.deepcopy(plain))}
    rows = []
    for what, make, training, batch in (("eval", forward, False, 1), ("training step", training_step, True, 2)):
        for net in nets.values():
            net.train(training)
        rows.append(measure(what, make, nets, torch.randn(batch, 3, 32, 32), options.rounds))
    table = Table("", "plain", "converted", "target")
    for row in rows:
        calls, ms = row["calls"], row["ms"]
        table.add_row(f"{row['what']}: Python calls", *(str(calls[net]) for net in nets), verdict(row, "calls"))
        table.add_row("milliseconds", *(f"{ms[net]:.1f}" for net in nets), "")
        table.add_row("ratio of times", "1", f"{row['ratio']:.2f}", verdict(row, "ratio"))
        table.add_row("outside kernels, of plain's time", "", f"{row['outside']:.2f}", verdict(row, "outside"))
        table.add_section()
    Console().print(table)
    if options.json:
        write_json(options.json, {"environment": describe(), "targets": TARGETS, "rows": rows})


if __name__ == "__main__":
    main()

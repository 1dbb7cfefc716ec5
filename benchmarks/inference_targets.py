# SPDX-License-Identifier: Apache-2.0
"""Measures inference on the CPU against other engines: ``python -m benchmarks.inference_targets --json FILE``.

DenseNets as torchvision has them, and RRDBNet x4, in eval mode under ``torch.inference_mode``: plain in both memory
formats, converted, converted and frozen, ONNX Runtime, and OpenVINO where it is installed. All take turns in one
process, outputs must agree before a figure is believed, and ratios are medians over rounds to the faster plain layout.
"""

import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastdense
from benchmarks.turns import Row, check_equal, parser_of, report, row_of_times
from fastdense.bench.engines import engine

ENGINES = tuple(name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name))


class Case(NamedTuple):
    """A plain network, its input, and threads."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    threads: int = 2
    engines: tuple[str, ...] = ENGINES


def _torchvision(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None)


def _rrdbnet() -> nn.Module:
    return fastdense.restore(fastdense.models.create("rrdbnet"))


CASES = {
    "DenseNet-121, 1 x 224 x 224": Case(partial(_torchvision, "densenet121"), (1, 3, 224, 224)),
    "DenseNet-121, 8 x 224 x 224": Case(partial(_torchvision, "densenet121"), (8, 3, 224, 224)),
    "DenseNet-201, 8 x 224 x 224": Case(partial(_torchvision, "densenet201"), (8, 3, 224, 224)),
    "DenseNet-121, 1 x 64 x 64, one thread": Case(partial(_torchvision, "densenet121"), (1, 3, 64, 64), threads=1),
    "RRDBNet x4, 96 x 96": Case(_rrdbnet, (1, 3, 96, 96)),
}


def measure(name: str, rounds: int) -> list[Row]:
    case = CASES[name]
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    plain, x = case.make().eval(), torch.randn(case.shape)
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": plain,
        "plain-channels-last": copy.deepcopy(plain).to(memory_format=torch.channels_last),
        "fastdense": fastdense.convert(copy.deepcopy(plain)),
    }
    dense = any(row.kind == "block" for row in fastdense.report(runs["fastdense"]).rows)  # type: ignore[arg-type]
    if dense:
        runs["fastdense, frozen"] = fastdense.freeze(copy.deepcopy(runs["fastdense"]))  # type: ignore[type-var]
    for other in case.engines:
        runs[other] = engine(other, plain, x, case.threads)
    inputs = {run: x for run in runs} | {"plain-channels-last": x.contiguous(memory_format=torch.channels_last)}
    with torch.inference_mode():
        expected = plain(x)
        for variant, run in runs.items():
            check_equal(f"{name}, {variant}", 0.0, float((run(inputs[variant]) - expected).norm() / expected.norm()))
        row = row_of_times(f"{name}, ms", {v: partial(run, inputs[v]) for v, run in runs.items()}, rounds, warm_up=2)
    rows = [row]
    samples = row["samples"]
    for other in case.engines:
        ratios = {}
        for variant in runs:
            if variant.startswith("fastdense"):
                pairs = sorted(a / b for a, b in zip(samples[variant], samples[other], strict=True))
                ratios[variant] = pairs[len(pairs) // 2]
        rows.append({"what": f"{name}, against {other}", "values": ratios, "ratios": ratios})
    return rows


def main() -> None:
    parser = parser_of(__doc__ or "", rounds=15)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="CASE")
    options = parser.parse_args()
    rows = [row for name in options.cases for row in measure(name, options.rounds)]
    report(rows, options.json, rounds=options.rounds)


if __name__ == "__main__":
    main()

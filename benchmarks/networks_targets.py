# SPDX-License-Identifier: Apache-2.0
"""Measures FC-DenseNet103 and MONAI's 3-D DenseNet121: ``python -m benchmarks.networks_targets --json FILE``.

Training steps without the optimizer, plain in both memory formats against the shared buffer; losses must agree before a
figure is believed. Memory is the peak that a step adds to a process, counted after a step on a small input has loaded
what all steps need. Times are taken in turns in one process, ratios are medians over rounds to the faster plain layout.
The join of FractalNet is compared with the mean of a stack.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastdense
from benchmarks.turns import Row, check_equal, in_own_process, parser_of, report, row_of_times, row_of_values
from fastdense.bench.memory import peak_above
from fastdense.ops import mean_join

VARIANTS = ("plain", "plain-channels-last", "balanced", "min")


class Case(NamedTuple):
    """A network, and the size ``[N, C, spatial]`` of a batch; ``small`` is enough to load its code."""

    make: Callable[[], nn.Module]
    size: tuple[int, ...]
    small: tuple[int, ...]


def _monai() -> nn.Module:
    from monai.networks.nets import DenseNet121

    return DenseNet121(spatial_dims=3, in_channels=1, out_channels=2)


CASES = {
    # Without dropout, whose masks plain modules and the blocks draw differently.
    "FC-DenseNet103": Case(
        lambda: fastdense.models.create("fc_densenet103", drop_rate=0.0), (1, 3, 360, 480), (1, 3, 64, 64)
    ),
    "MONAI DenseNet121 3-D": Case(_monai, (2, 1, 64, 64, 64), (2, 1, 32, 32, 32)),
}


class Step:
    """A training step of a variant."""

    def __init__(self, case: str, variant: str) -> None:
        torch.manual_seed(0)
        self.net = fastdense.restore(CASES[case].make())
        self.layout = torch.contiguous_format
        if variant == "plain-channels-last":
            self.layout = torch.channels_last_3d if len(CASES[case].size) == 5 else torch.channels_last
            self.net = self.net.to(memory_format=self.layout)
        if not variant.startswith("plain"):
            fastdense.convert(self.net, memory=variant)

    def __call__(self, size: tuple[int, ...]) -> float:
        x = torch.rand(size, generator=torch.Generator().manual_seed(1)).to(memory_format=self.layout)
        self.net.zero_grad(set_to_none=True)
        loss = self.net(x).logsumexp(1).mean()
        loss.backward()
        return loss.item()


def _peak(case: str, variant: str, threads: int) -> tuple[float, float]:
    torch.set_num_threads(threads)
    step = Step(case, variant)
    step(CASES[case].small)
    step.net.zero_grad(set_to_none=True)
    return peak_above(lambda: step(CASES[case].size))


def memory(case: str) -> Row:
    peaks = {variant: in_own_process(_peak, case, variant, torch.get_num_threads()) for variant in VARIANTS}
    for variant, (_, loss) in peaks.items():
        check_equal(f"{case} {variant}", peaks["plain"][1], loss, 1e-3)
    what = f"{case} {'x'.join(map(str, CASES[case].size))}, peak of a step, MiB"
    return row_of_values(what, {variant: mib for variant, (mib, _) in peaks.items()})


def times(case: str, rounds: int) -> Row:
    steps = {variant: Step(case, variant) for variant in VARIANTS}
    runs = {variant: (lambda s=step: s(CASES[case].size)) for variant, step in steps.items()}
    expected = runs["plain"]()
    for variant in VARIANTS[1:]:
        check_equal(f"{case} {variant}", expected, runs[variant](), 1e-3)
    return row_of_times(f"{case} {'x'.join(map(str, CASES[case].size))}, ms/step", runs, rounds)


def join(columns: int, rounds: int) -> Row:
    """Forward and backward of the mean of some columns, of the first stage of a FractalNet."""
    size = (64, 64, 32, 32)

    def run(layout: torch.memory_format, mean: Callable[[list[Tensor]], Tensor]) -> Callable[[], Tensor]:
        inputs = [
            torch.randn(size, generator=torch.Generator().manual_seed(n)).to(memory_format=layout).requires_grad_()
            for n in range(columns)
        ]
        grad = torch.ones(size).to(memory_format=layout)

        def step() -> Tensor:
            out = mean(inputs)
            torch.autograd.grad(out, inputs, grad)
            return out.detach()

        return step

    stacked: Any = lambda inputs: torch.stack(inputs).mean(0)  # noqa: E731
    runs = {
        "plain": run(torch.contiguous_format, stacked),
        "plain-channels-last": run(torch.channels_last, stacked),
        "balanced": run(torch.contiguous_format, mean_join),
        "min": run(torch.channels_last, mean_join),
    }
    for variant in VARIANTS[1:]:
        torch.testing.assert_close(runs[variant](), runs["plain"]())
    return row_of_times(f"join of {columns} columns, ms; in both formats instead of modes", runs, rounds)


def main() -> None:
    parser = parser_of(__doc__, 5)
    parser.add_argument("--only", choices=("memory", "time", "join"), help="measure a part")
    options = parser.parse_args()
    rows = []
    if options.only in (None, "memory"):
        rows += [memory(case) for case in CASES]
    if options.only in (None, "time"):
        rows += [times(case, options.rounds) for case in CASES]
    if options.only in (None, "join"):
        rows += [join(columns, 4 * options.rounds) for columns in (2, 4)]
    report(rows, options.json)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Measures grouped 3x3 convolutions: ``python -m benchmarks.grouped_conv_targets --json FILE``.

Those of dual path networks, in a block whose paths have 8 channels each, so that little more is left than norm_b,
conv_b and norm_c: plain in both memory formats, which is the library's convolution with passes around it, against the
operator. Outputs and gradients must agree before a figure is believed. Times are taken in turns in one process, ratios
are medians over rounds to the faster plain layout.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.turns import Row, parser_of, report, row_of_times
from fastdense.nn import DualPathBlock
from fastdense.plain.dual_path import PlainDualPathBlock

LAYOUTS = {"plain": torch.contiguous_format, "plain-channels-last": torch.channels_last}


class Case(NamedTuple):
    """A 3x3 convolution of a network: its width, its groups, the side of the image that it reads."""

    width: int
    groups: int
    side: int
    stride: int = 1


# Width in the first stage, and groups.
NETWORKS = {"DPN-68": (128, 32), "DPN-92": (96, 32), "DPN-98, DPN-131": (160, 40), "DPN-107": (200, 50)}


def cases(network: str) -> Iterator[Case]:
    width, groups = NETWORKS[network]
    for stage in range(4):
        if stage > 0:
            yield Case(width << stage, groups, 112 >> stage, 2)
        yield Case(width << stage, groups, 56 >> stage)


class Run:
    """A block of a case, forward and backward."""

    def __init__(self, case: Case, kind: type[PlainDualPathBlock], layout: torch.memory_format, batch: int) -> None:
        torch.manual_seed(0)
        block = kind(16, case.width, 8, 8, groups=case.groups, projection=case.stride == 2, stride=case.stride)
        self.block = block.to(memory_format=layout)
        x = torch.randn(batch, 16, case.side, case.side).contiguous(memory_format=layout)
        self.x = x.requires_grad_()

    def evaluate(self) -> Tensor:
        self.block.eval()
        with torch.no_grad():
            return self.block(self.x)

    def forward(self) -> Tensor:
        self.block.train()
        return self.block(self.x)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        wanted = [self.x, *self.block.parameters()]
        return torch.autograd.grad(out, wanted, torch.ones_like(out), retain_graph=True)


def check(name: str, expected: list[Tensor], actual: list[Tensor]) -> None:
    """A wrong result is not reported. The first two are outputs; in gradients a few ReLUs may have flipped."""
    largest = max(t.norm() for t in expected)
    for index, (right, given) in enumerate(zip(expected, actual, strict=True)):
        error = (given - right).norm() / right.norm().clamp_min(1e-2 * largest)
        if not error < (1e-4 if index < 2 else 1e-2):
            raise SystemExit(f"{name}: result {index} is {error:.1e} off")


def times(network: str, case: Case, batch: int, rounds: int) -> list[Row]:
    name = f"{network}, {case.width // case.groups} channels a group, {case.side}^2" + " / 2" * (case.stride - 1)
    variants = {variant: Run(case, PlainDualPathBlock, layout, batch) for variant, layout in LAYOUTS.items()}
    variants["fastdense"] = Run(case, DualPathBlock, torch.channels_last, batch)
    outs = {variant: run.forward() for variant, run in variants.items()}
    results = {
        variant: [run.evaluate(), outs[variant].detach(), *run.backward(outs[variant])]
        for variant, run in variants.items()
    }
    for variant in ("plain-channels-last", "fastdense"):
        check(f"{name}, {variant}", results["plain"], results[variant])

    def row(what: str, call: Callable[[str, Run], object]) -> Row:
        runs = {variant: (lambda v=variant, r=run: call(v, r)) for variant, run in variants.items()}
        return row_of_times(f"{name}, {what}, ms", runs, rounds)

    return [
        row("eval", lambda _, run: run.evaluate()),
        row("forward", lambda _, run: run.forward()),
        row("backward", lambda variant, run: run.backward(outs[variant])),
    ]


def main() -> None:
    parser = parser_of(__doc__, 7)
    parser.add_argument("--only", choices=tuple(NETWORKS), nargs="+", default=tuple(NETWORKS), help="networks")
    parser.add_argument("--batch", type=int, default=4, help="images; default: %(default)s")
    options = parser.parse_args()
    rows = [
        row for name in options.only for case in cases(name) for row in times(name, case, options.batch, options.rounds)
    ]
    report(rows, options.json, batch=options.batch)


if __name__ == "__main__":
    main()

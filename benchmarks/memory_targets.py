# SPDX-License-Identifier: Apache-2.0
"""Measures memory modes and plans: ``python -m benchmarks.memory_targets --json FILE``.

Six parts, of training steps without the optimizer; ``--part`` chooses.

* slope: peak of tensor memory that each further image adds, in MiB, by memory mode; from torch's allocator.
* time: of each mode, against plain modules in the better memory format, in turns.
* plans: for budgets between the least and the most that a network needs, the peak and the time of a step in the
  plan's modes, over what the plan promises.
* checkpoint: ``torch.utils.checkpoint`` around each block, and the plan that fits into the same peak.
* compile: the same for torch.compile with ``activation_memory_budget``; it compiles for minutes.
* deep: a DenseNet-BC of a thousand layers, 8 images of 32 x 32: the peak above parameters and their gradients.
"""

import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastdense
from benchmarks.turns import Row, check_equal, parser_of, report, row_of_times
from fastdense._C import AllocationTape
from fastdense.memory.plan import memory_front
from fastdense.memory.rivals import COMPILE_BUDGETS, checkpointed

MODES = ("balanced", "min", "recompute")
PARTS = ("slope", "time", "plans", "checkpoint", "compile", "deep")


class Case(NamedTuple):
    """A plain network, one image, and the batch of timed steps."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int


def _torchvision(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name)


def _monai() -> nn.Module:
    from monai.networks.nets import DenseNet121

    return DenseNet121(spatial_dims=3, in_channels=1, out_channels=2)


def _dpn() -> nn.Module:
    import timm

    return timm.create_model("dpn92")


CASES = {
    "DenseNet-121, 224": Case(lambda: _torchvision("densenet121"), (3, 224, 224), 4),
    "DenseNet-201, 224": Case(lambda: _torchvision("densenet201"), (3, 224, 224), 4),
    "MONAI DenseNet121 3-D, 96^3": Case(_monai, (1, 96, 96, 96), 1),
    "FC-DenseNet103, 360 x 480": Case(lambda: _own("fc_densenet103", drop_rate=0.0), (3, 360, 480), 1),
    "DPN-92, 224": Case(_dpn, (3, 224, 224), 4),
    "RRDBNet, 48": Case(lambda: _own("rrdbnet"), (3, 48, 48), 1),
}
# Where the slope needs no large batch, and plans are quick to check.
PLANNED = ("DenseNet-121, 224", "DPN-92, 224", "FC-DenseNet103, 360 x 480", "RRDBNet, 48")


def _own(name: str, **options: Any) -> nn.Module:
    return fastdense.restore(fastdense.models.create(name, **options))


def made(case: str, memory: str | None, layout: torch.memory_format = torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    net = CASES[case].make().train()
    if layout != torch.contiguous_format:
        net = net.to(memory_format=layout)
    return net if memory is None else fastdense.convert(net, memory=memory)


def images(case: str, batch: int) -> Tensor:
    return torch.rand(batch, *CASES[case].shape, generator=torch.Generator().manual_seed(1))


def step(net: nn.Module, x: Tensor) -> float:
    net.zero_grad(set_to_none=True)
    loss = net(x).float().square().mean()
    loss.backward()
    return loss.item()


def peak(net: nn.Module, x: Tensor) -> int:
    """Bytes that a step takes at most, from torch's allocator, beside parameters, buffers and images."""
    net.zero_grad(set_to_none=True)
    with AllocationTape("cpu") as tape:
        step(net, x)
    return max(accumulate(tape.bytes))


def slope(case: str) -> Row:
    values = {}
    for memory in MODES:
        net = made(case, memory)
        first, second = (peak(net, images(case, batch)) for batch in (2, 4))
        values[memory] = (second - first) / 2 / 2**20
    return {
        "what": f"{case}, MiB/image",
        "values": values,
        "ratios": {"recompute": values["recompute"] / values["min"]},
    }


def times(case: str, rounds: int) -> Row:
    x = images(case, CASES[case].batch)
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    runs, losses = {}, {}
    for variant in ("plain", "plain-channels-last", *MODES):
        layout = torch.contiguous_format if variant == "plain" else last
        net = made(case, None if variant.startswith("plain") else variant, layout)
        given = x.contiguous(memory_format=layout)
        runs[variant] = lambda net=net, given=given: step(net, given)
        losses[variant] = runs[variant]()
        check_equal(f"{case} {variant}", losses["plain"], losses[variant], 1e-3)
    return row_of_times(f"{case}, {len(x)} images, ms/step", runs, rounds)


def plans(case: str, budgets: int, batch: int) -> Row:
    net = made(case, "balanced")
    shape = CASES[case].shape
    front = memory_front(net, shape, batch_size=batch)
    most, least = front[0][0], front[-1][0]
    x = images(case, batch)
    peaks, seconds = [], []
    for at in range(budgets):
        budget = least + (most - least) * at // max(1, budgets - 1)
        plan = fastdense.plan_memory(net, shape, batch_size=batch, budget=budget)
        plan.apply()
        peaks.append((plan.fixed_bytes + peak(net, x)) / plan.peak_bytes)
        # The first step is colder. A promise leaves it out, too, and takes the quickest of those behind it.
        _, *taken = [_timed(net, x) for _ in range(4)]
        seconds.append(min(taken) / plan.step_seconds)
    values = {"peak, least": min(peaks), "peak, most": max(peaks)}
    values |= {"time, least": min(seconds), "time, most": max(seconds)}
    return {"what": f"{case}, {budgets} budgets, measured / promised", "values": values, "ratios": values}


def _timed(net: nn.Module, x: Tensor) -> float:
    begin = time.perf_counter()
    step(net, x)
    return time.perf_counter() - begin


def against(case: str, batch: int, rounds: int, rival: str) -> Row:
    """A rival that computes activations again, and the plan that fits into its peak; in turns."""
    from torch._functorch import config

    x = images(case, batch)
    name, _, share = rival.partition(" ")
    theirs = made(case, None)
    if name == "checkpoint":
        theirs = checkpointed(theirs, [row.name for row in fastdense.report(theirs).rows if row.kind == "block"])
    else:
        theirs = torch.compile(theirs)
    with config.patch(activation_memory_budget=float(share or 1)):  # read when the first step compiles
        expected = step(theirs, x)
    ours = made(case, "balanced")
    weights = sum(p.nbytes for p in ours.parameters()) + sum(b.nbytes for b in ours.buffers())
    budget = weights + x.nbytes + peak(theirs, x)
    plan = fastdense.plan_memory(ours, CASES[case].shape, batch_size=batch, budget=budget, optimizer_state=0)
    plan.apply()
    check_equal(f"{case}, {rival}", expected, step(ours, x), 1e-3)
    runs = {"plain": lambda: step(theirs, x), "plain-channels-last": lambda: None, "plan": lambda: step(ours, x)}
    row = row_of_times(f"{case}, {batch} images, {rival} and plan in {budget / 2**20:.0f} MiB", runs, rounds)
    pairs = zip(row["samples"]["plan"], row["samples"]["plain"], strict=True)
    values = {rival: row["values"]["plain"], "plan": row["values"]["plan"]}
    return {"what": row["what"], "values": values, "ratios": {"plan": statistics.median(a / b for a, b in pairs)}}


def deep() -> Row:
    values = {}
    x = torch.rand(8, 3, 32, 32)
    for memory in ("min", "recompute"):
        net = fastdense.models.densenet_cifar(1000, memory=memory).train()
        gradients = sum(p.nbytes for p in net.parameters())
        values[memory] = (peak(net, x) - gradients) / 2**20
    return {"what": "DenseNet-BC, L=1000, k=12, 8 images, MiB above gradients", "values": values, "ratios": {}}


def main() -> None:
    parser = parser_of(__doc__, 5)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS, help="default: all")
    parser.add_argument("--only", choices=tuple(CASES), nargs="+", default=tuple(CASES), help="networks; default: all")
    parser.add_argument("--budgets", type=int, default=20, help="of each network in plans; default: %(default)s")
    parser.add_argument("--batch", type=int, help="images in plans, checkpoint, compile; default: each network's own")
    options = parser.parse_args()
    rows = []
    if "slope" in options.part:
        rows += [slope(case) for case in options.only]
    if "time" in options.part:
        rows += [times(case, options.rounds) for case in options.only]
    planned = [case for case in options.only if case in PLANNED]
    if "plans" in options.part:
        rows += [plans(case, options.budgets, options.batch or CASES[case].batch) for case in planned]
    networks = [case for case in options.only if case.startswith("DenseNet")]
    rivals = ["checkpoint"] if "checkpoint" in options.part else []
    rivals += [f"compile {share}" for share in COMPILE_BUDGETS] if "compile" in options.part else []
    rows += [
        against(case, options.batch or CASES[case].batch, options.rounds, rival)
        for case in networks
        for rival in rivals
    ]
    if "deep" in options.part:
        rows.append(deep())
    report(rows, options.json)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""``fastdense plan``."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

from fastdense._support import InputError, check_output
from fastdense.cli.arguments import Commands, add_command, add_machine, add_model, check_of_cifar

HELP = """Fit a training step into a budget of memory, in the least time.

Every block of a model saves tensors for its backward pass in one of several ways: the more it saves, the less it
computes again. A copy of the model runs a few small steps; from these follow the peak of tensor memory and the time at
any batch size. The table has the mode of each block, what it keeps, and the other modes.

examples:
  fastdense plan --budget 2GiB                            DenseNet-121, 224 x 224, batch 32
  fastdense plan --model densenet201 --size 224 --batch 256 --budget 24GiB
  fastdense plan --largest-batch --budget 80%             how many images fit
  fastdense plan --plot plan.png                          memory against time, beside plain PyTorch and checkpoints

In a program: fastdense.plan_memory(model, (3, 224, 224), batch_size=32, budget="2GiB").apply()
Exit code 2 where no choice fits; the message has the least budget, and the largest batch that fits.
"""


BATCH = 32


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "plan", HELP, run)
    add_model(parser, "densenet121", "densenet121", depth=100)
    parser.add_argument("--batch", type=int, help=f"images per step (default: {BATCH})")
    parser.add_argument("--size", type=int, help="side of an image in pixels (default: 224, or 32 for densenet_cifar)")
    parser.add_argument(
        "--budget", default="80%", help="tensor memory: 8GiB, 500MB, or a share of the device's (default: 80%%)"
    )
    parser.add_argument(
        "--optimizer-state", type=float, default=1.0, metavar="F", help="numbers a parameter: Adam has 2"
    )
    parser.add_argument("--largest-batch", action="store_true", help="find how many images fit, and plan for these")
    parser.add_argument(
        "--no-measure", dest="measure", action="store_false", help="count operations; the same plan on every machine"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with bytes and seconds")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory against time (.png, .svg, .pdf)")
    parser.add_argument(
        "--compile", action="store_true", help="draw torch.compile's memory budget, too; it compiles for minutes"
    )
    add_machine(parser)


def run(options: argparse.Namespace) -> int:
    """Measures, then prints, and draws, the plan."""
    import torch

    from fastdense import convert, report
    from fastdense.bench import Net
    from fastdense.bench.nets import known_nets, plain_model
    from fastdense.memory.plan import largest_batch, memory_front, plan_memory
    from fastdense.models import memory_modes

    known = [name for name in known_nets() if memory_modes(name)]
    if options.model not in known:
        raise InputError(f"plan: expected --model to be one of {', '.join(known)}, got {options.model!r}")
    check_of_cifar("plan", options)
    if options.largest_batch and options.batch is not None:
        raise InputError("plan: expected either --batch or --largest-batch, got both")
    if options.growth_rate < 1:
        raise InputError(f"plan: expected --growth-rate to be at least 1, got {options.growth_rate}")
    if options.plot is not None:
        check_output("plan: expected --plot", options.plot, (".png", ".svg", ".pdf"))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("plan: device 'cuda' is not available; use --device cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    net = Net(options.model, options.depth, options.growth_rate)
    plain = plain_model(net).train().to(options.device)
    model = convert(copy.deepcopy(plain))
    size = options.size if options.size is not None else net.default_size
    how: dict[str, Any] = {"optimizer_state": options.optimizer_state, "measure": options.measure}
    if options.dtype != "float32":
        how["dtype"] = getattr(torch, options.dtype)
    shape, batch = (3, size, size), BATCH if options.batch is None else options.batch
    try:
        if options.largest_batch:
            batch = largest_batch(model, shape, budget=options.budget, **how)
            if batch == 0:
                raise InputError(f"plan: not even one image fits into {options.budget}")
        plan = plan_memory(model, shape, batch_size=batch, budget=options.budget, **how)
    except ValueError as error:
        raise InputError(str(error)) from error
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        message = f"plan: steps of a few images of {size} x {size} do not fit into memory; use a smaller --size"
        raise InputError(message) from error
    if options.json:
        print(json.dumps(plan.to_dict() | {"model": options.model, "shape": shape}, indent=2))
    else:
        print(plan)
    if options.plot is not None:
        from fastdense.bench.plots import save_front
        from fastdense.memory.rivals import rival_steps

        front = memory_front(model, shape, batch_size=batch, **how)
        rivals = []
        if options.measure:  # counted seconds are not theirs
            blocks = [row.name for row in report(plain).rows if row.kind == "block"]
            rivals = rival_steps(plain, blocks, shape, batch_size=batch, compiled=options.compile, **how)
        title = f"{net.label}, batch {batch}, {size} x {size}"
        save_front(front, (plan.peak_bytes, plan.step_seconds), rivals, title, options.plot)
        print(f"wrote {options.plot}")
    return 0

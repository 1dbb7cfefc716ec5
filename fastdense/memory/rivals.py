# SPDX-License-Identifier: Apache-2.0
"""What others save memory with in the same training step: checkpoints around blocks, torch.compile's budget."""

import copy
import time
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdense._C import AllocationTape
from fastdense.memory.step import BATCHES, StepOptions, StepSetting
from fastdense.memory.tape import Part, copied, extrapolate

# Shares of the memory that torch.compile saves by itself.
COMPILE_BUDGETS = (0.5, 0.1)


class RivalStep(NamedTuple):
    """A training step in plain modules: the peak of tensor memory as in a plan, and seconds."""

    name: str
    peak_bytes: int
    step_seconds: float


class Checkpointed(nn.Module):
    """A block that ``torch.utils.checkpoint`` runs again in backward; running statistics of its norms move twice."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Tensor) -> Tensor:
        return checkpoint(self.block, *inputs, use_reentrant=False)


def checkpointed(model: nn.Module, blocks: Iterable[str]) -> nn.Module:
    """A copy of a plain model with :class:`Checkpointed` around its blocks."""
    twin = copy.deepcopy(model)
    for name in blocks:
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, Checkpointed(twin.get_submodule(name)))
    return twin


def rival_steps(
    model: nn.Module,
    blocks: Sequence[str],
    input_shape: Sequence[int],
    *,
    batch_size: int,
    compiled: bool = False,
    **options: Unpack[StepOptions],
) -> list[RivalStep]:
    """Peak and time of a training step of plain modules, of checkpoints around the blocks, and of torch.compile.

    Each runs in both memory formats where images have one, and the quicker one counts. As in a plan, a batch beyond 8
    images is not run, but follows from two smaller ones.

    Args:
        model: plain, on the device where it shall run.
        blocks: names of the modules to put under a checkpoint.
        input_shape: of one image, ``[channels, spatial]``.
        batch_size: images of a step.
        compiled: whether torch.compile is tried, with ``activation_memory_budget`` at half and a tenth; it compiles for
            minutes.
        options: see :class:`fastdense.memory.step.StepOptions`.

    Returns:
        A step each.
    """
    setting = StepSetting.of("rival_steps", model, input_shape, options)
    made: list[tuple[str, nn.Module, float | None]] = [("plain", model, None)]
    made.append(("checkpoint", checkpointed(model, blocks), None))
    if compiled:
        made += [(f"compile, budget {share}", model, share) for share in COMPILE_BUDGETS]
    return [_quicker(name, net, setting, batch_size, share) for name, net, share in made]


def _quicker(name: str, model: nn.Module, setting: StepSetting, batch: int, share: float | None) -> RivalStep:
    formats = [torch.contiguous_format]
    if len(setting.shape) in (3, 4):
        formats.append(torch.channels_last if len(setting.shape) == 3 else torch.channels_last_3d)
    steps = [_step(model, setting, batch, share, memory_format) for memory_format in formats]
    best = min(steps, key=lambda part: part.seconds)
    return RivalStep(name, setting.fixed_bytes(batch) + best.peak, best.seconds)


def _step(
    model: nn.Module, setting: StepSetting, batch: int, share: float | None, memory_format: torch.memory_format
) -> Part:
    if batch <= BATCHES[1]:
        return _run(model, setting, batch, share, memory_format)
    small, large = (_run(model, setting, size, share, memory_format) for size in BATCHES)
    return extrapolate(small, large, BATCHES, batch)


def _run(
    model: nn.Module, setting: StepSetting, batch: int, share: float | None, memory_format: torch.memory_format
) -> Part:
    from torch._functorch import config

    twin = copied(model).to(memory_format=memory_format)
    if share is not None:
        torch.compiler.reset()
        twin.compile(dynamic=False)
    seconds = []
    with setting.running(batch) as x, config.patch(activation_memory_budget=1.0 if share is None else share):
        x = x.contiguous(memory_format=memory_format)
        for _ in range(3):  # the first is colder, and compiles
            twin.zero_grad()
            begin = _now(setting.device)
            with AllocationTape(setting.device.type) as tape:
                loss = setting.loss(twin(x))
                loss.backward()
                del loss
            seconds.append(_now(setting.device) - begin)
    peak = max(accumulate(tape.bytes))
    return Part((peak, -peak), min(seconds[1:]))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

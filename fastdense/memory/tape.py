# SPDX-License-Identifier: Apache-2.0
"""Runs training steps and writes down, part by part, what tensor memory they take and how long they last."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdense._C import AllocationTape
from fastdense.memory.modes import fused_blocks
from fastdense.memory.operations import NOMINAL_RATE, count_operations

_OPERATORS = ("dense_block", "dual_path_stage", "residual_dense_block")


class Part(NamedTuple):
    """A stretch of a step: the bytes that it takes (or, below zero, gives back) one after the other, and seconds."""

    changes: tuple[int, ...]
    seconds: float

    @property
    def net(self) -> int:
        """Bytes that are left, or gone, behind it."""
        return sum(self.changes)

    @property
    def peak(self) -> int:
        """The most bytes in use at one moment, above what is in use in front of it."""
        return max(accumulate(self.changes), default=0) if max(self.changes, default=0) > 0 else 0


class Step(NamedTuple):
    """A training step in parts.

    ``forward`` and ``backward`` have a part for each unit, which is the blocks that run as one operator: from its own
    beginning to that of the next one, when what it does not keep is gone. The first part has what is in front of it as
    well, the last one what is behind, and the loss. ``turn`` is the backward pass up to the last unit's.
    """

    units: tuple[tuple[str, ...], ...]
    forward: tuple[Part, ...]
    turn: Part
    backward: tuple[Part, ...]  # in the order of the units

    def in_order(self) -> list[Part]:
        """All parts as they run."""
        return [*self.forward, self.turn, *reversed(self.backward)]

    @property
    def peak(self) -> int:
        """The most bytes in use at one moment, above what is in use before the step."""
        return max(accumulate(change for part in self.in_order() for change in part.changes))

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.in_order())


def run_step(
    model: nn.Module, input: Tensor, loss: Callable[[Any], Tensor], names: dict[int, str], measure: bool = True
) -> Step:
    """One training step of a model, which is left with gradients and moved statistics.

    Args:
        names: of the block that each parameter belongs to, by its address, see :func:`names_of_blocks`.
        measure: whether seconds are of the clock, or of counted operations.

    Raises:
        ValueError: where units run twice, or not in the opposite order backward.
    """
    model.zero_grad()
    with AllocationTape(input.device.type) as tape, _Watch(tape, names, measure) as watch:
        begin = watch.now()
        result = loss(model(input))
        watch.backward_begins()
        result.backward()
        del result
        end = watch.now()
    return _cut(tape.bytes, [begin, watch.turn, end], watch.forward, watch.backward)


class _Moment(NamedTuple):
    position: int  # on the tape
    seconds: float


class _Watch(TorchDispatchMode):
    """Notes when each unit begins, in both passes."""

    def __init__(self, tape: AllocationTape, names: dict[int, str], measure: bool) -> None:
        super().__init__()
        self.forward: dict[tuple[str, ...], _Moment] = {}
        self.turn = _Moment(0, 0.0)
        self.backward: dict[tuple[str, ...], _Moment] = {}
        self._tape, self._names, self._is_backward = tape, names, False
        self._measure, self._counted = measure, 0

    def now(self) -> _Moment:
        if not self._measure:
            return _Moment(self._tape.position, self._counted / NOMINAL_RATE)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return _Moment(self._tape.position, time.perf_counter())

    def backward_begins(self) -> None:
        self.turn, self._is_backward = self.now(), True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        unit: tuple[str, ...] = ()
        if namespace == "fastdense" and name.removeprefix("_").removesuffix("_backward") in _OPERATORS:
            found = (self._names.get(t.data_ptr()) for t in _weights(args) if t.numel() > 0)
            unit = tuple(dict.fromkeys(name for name in found if name is not None))
        if unit and self._is_backward:
            self.backward.setdefault(unit, self.now())
        elif unit in self.forward:
            raise ValueError(f"plan_memory: {unit[0]} runs more than once in a step, which no plan can follow")
        elif unit:
            self.forward[unit] = self.now()
        result = func(*args, **(kwargs or {}))
        if not self._measure:
            self._counted += count_operations(func, args, kwargs or {}, result)
        return result


def _weights(arguments: Sequence[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, list | tuple) and argument and isinstance(argument[0], Tensor):
            yield from argument


def _cut(
    changes: list[int],
    ends: list[_Moment],
    forward: dict[tuple[str, ...], _Moment],
    backward: dict[tuple[str, ...], _Moment],
) -> Step:
    units = list(forward)
    if not units or list(backward) != units[::-1]:
        raise ValueError(
            "plan_memory: expected the blocks to run backward in the opposite order, all of them; got "
            f"{[unit[0] for unit in units]} forward and {[unit[0] for unit in backward]} backward"
        )
    begin, turn, end = ends
    moments = [begin, *list(forward.values())[1:], turn, *backward.values(), end]
    parts = [
        Part(tuple(changes[first.position : last.position]), last.seconds - first.seconds)
        for first, last in pairwise(moments)
    ]
    count = len(units)
    return Step(tuple(units), tuple(parts[:count]), parts[count], tuple(parts[count + 1 :][::-1]))


def extrapolate(small: Part, large: Part, batches: tuple[int, int], batch: int) -> Part:
    """A part at another batch size, from two: tensors grow by so much for each image, and so do the seconds.

    Where the two did not take memory equally often, the growth of the peak and of what is left count.
    """
    first, second = batches
    step = (batch - first) / (second - first)

    def at(a: int, b: int) -> int:
        return round(a + (b - a) * step)

    seconds = max(large.seconds, large.seconds + (large.seconds - small.seconds) * (batch - second) / (second - first))
    if len(small.changes) == len(large.changes):
        return Part(tuple(at(a, b) for a, b in zip(small.changes, large.changes, strict=True)), seconds)
    peak, net = at(small.peak, large.peak), at(small.net, large.net)
    return Part((max(peak, net), net - max(peak, net)), seconds)


def extrapolate_step(small: Step, large: Step, batches: tuple[int, int], batch: int) -> Step:
    """A whole step at another batch size."""

    def parts(a: Sequence[Part], b: Sequence[Part]) -> tuple[Part, ...]:
        return tuple(extrapolate(x, y, batches, batch) for x, y in zip(a, b, strict=True))

    (turn,) = parts([small.turn], [large.turn])
    return Step(large.units, parts(small.forward, large.forward), turn, parts(small.backward, large.backward))


def quickest(steps: Sequence[Step]) -> Step:
    """Of the same step run again and again, each part in its least time."""

    def best(parts: Sequence[Part]) -> Part:
        return parts[-1]._replace(seconds=min(part.seconds for part in parts))

    return Step(
        steps[-1].units,
        tuple(best(parts) for parts in zip(*(step.forward for step in steps), strict=True)),
        best([step.turn for step in steps]),
        tuple(best(parts) for parts in zip(*(step.backward for step in steps), strict=True)),
    )


def names_of_blocks(model: nn.Module) -> dict[int, str]:
    """The names of the fused blocks that parameters belong to, by their address."""
    return {p.data_ptr(): block.name for block in fused_blocks(model) for p in block.module.parameters()}


def copied(model: nn.Module) -> nn.Module:
    """A copy to run steps on, without gradients."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.grad = None
    return twin

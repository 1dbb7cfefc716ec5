# SPDX-License-Identifier: Apache-2.0
"""Chooses the memory mode of every block so that a training step fits into a budget and takes the least time."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import torch
from torch import nn

from fastdense.fusion.checks import CALL_CONVERT, check_module
from fastdense.memory.choice import Problem, cheapest, least_peak, pareto_front, pose
from fastdense.memory.modes import Block, fused_blocks, set_memory
from fastdense.memory.sizes import read_budget, show_bytes
from fastdense.memory.step import BATCHES, StepOptions, StepSetting
from fastdense.memory.tape import Step, copied, extrapolate_step, names_of_blocks, quickest, run_step

_MOST_IMAGES = 2**20


class InsufficientMemory(ValueError):
    """No choice of memory modes fits into the budget.

    ``least`` is the smallest peak of any choice, in bytes; ``largest_batch`` the most images that fit, 0 for none.
    """

    def __init__(self, message: str, least: int, largest_batch: int) -> None:
        super().__init__(message)
        self.least, self.largest_batch = least, largest_batch


class PlanRow(NamedTuple):
    """Blocks that run as one operator: the mode chosen, bytes kept between the passes, seconds, and of every mode."""

    blocks: tuple[str, ...]
    memory: str
    kept_bytes: int
    seconds: float
    kept_by_mode: dict[str, int]
    seconds_by_mode: dict[str, float]


class MemoryPlan(NamedTuple):
    """A mode for every block, and what a training step then needs; ``print`` shows a table.

    ``peak_bytes`` is the most tensor memory in use at one moment: parameters and buffers, the optimizer's state, the
    images, and what the step allocates. ``fixed_bytes`` is the part of it that is there before the step.
    ``step_seconds`` is measured on this machine, or counted, or follows from two smaller batches.
    """

    rows: tuple[PlanRow, ...]
    batch_size: int
    budget_bytes: int
    peak_bytes: int
    fixed_bytes: int
    step_seconds: float
    model: Any  # a weak reference

    @property
    def modes(self) -> dict[str, str]:
        """The mode of each block by its name, as :func:`set_memory` takes it."""
        return {name: row.memory for row in self.rows for name in row.blocks}

    def apply(self, model: nn.Module | None = None) -> None:
        """Sets the modes in the model that was planned for, or in another one with the same blocks."""
        model = model if model is not None else self.model()
        if model is None:
            raise ValueError("MemoryPlan.apply: the model is gone; hand it over")
        set_memory(model, self.modes)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        made = {name: getattr(self, name) for name in self._fields if name not in ("rows", "model")}
        return made | {"rows": [row._asdict() | {"blocks": list(row.blocks)} for row in self.rows]}

    def __str__(self) -> str:
        heads = ("blocks", "memory", "kept", "time", "other modes")
        lines = [heads]
        for row in self.rows:
            name = row.blocks[0] if len(row.blocks) == 1 else f"{row.blocks[0]} ... {row.blocks[-1].split('.')[-1]}"
            others = "; ".join(
                f"{mode} {show_bytes(kept)}, {1000 * row.seconds_by_mode[mode]:.1f} ms"
                for mode, kept in row.kept_by_mode.items()
                if mode != row.memory
            )
            lines.append((name, row.memory, show_bytes(row.kept_bytes), f"{1000 * row.seconds:.1f} ms", others))
        widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        text.insert(1, "  ".join("-" * width for width in widths))
        text.append(
            f"batch {self.batch_size}: peak {show_bytes(self.peak_bytes)} of {show_bytes(self.budget_bytes)}, of which "
            f"{show_bytes(self.fixed_bytes)} before the step; {1000 * self.step_seconds:.0f} ms a step"
        )
        return "\n".join(text)


def plan_memory(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    batch_size: int,
    budget: int | float | str,
    **options: Unpack[StepOptions],
) -> MemoryPlan:
    """Finds the memory modes that fit a training step into a budget in the least time.

    A copy of the model runs a few steps in every mode: of ``batch_size`` images, or of 2 and of 8 where those are more.
    Each allocation grows by so much for every image, which gives the peak at any batch size. The choice is exact, by
    dynamic programming over the blocks; a step in the modes chosen is run at last, and its peak is what the plan
    promises.

    Args:
        model: converted, see :func:`convert`, in the mode (training, frozen) in which it will be trained. It is not
            changed: see :meth:`MemoryPlan.apply`.
        input_shape: of one image, ``[channels, spatial]``.
        batch_size: images of a step.
        budget: the most tensor memory, in bytes, or like ``"8GiB"``, or like ``"80%"`` of the device's memory. What
            libraries and the process need beside tensors is not in it.
        options: see :class:`StepOptions`.

    Returns:
        The plan.

    Raises:
        InsufficientMemory: if no modes fit; the message names the least budget and the largest batch that fit.
        ValueError: no fused blocks, a shape or a batch size or a budget that is none, blocks that run more than once
            in a step.
        TypeError: if ``model`` is no module, or ``loss`` no function.

    Note:
        The steps draw random numbers, and the generators are put back behind them; do not draw in another thread
        meanwhile. Blocks on a shared buffer, :class:`fastdense.nn.SharedBufferBlock`, have one mode,
        and dual path blocks that no operator runs keep theirs.

    Example:
        >>> import fastdense
        >>> model = fastdense.models.densenet_cifar(22)
        >>> plan = plan_memory(model, (3, 32, 32), batch_size=8, budget="1GiB")
        >>> plan.apply()
    """
    check_module("plan_memory", model)
    _check_batch_size("plan_memory", batch_size)
    return _Measured.of("plan_memory", model, input_shape, options).plan(batch_size, budget)


def largest_batch(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    budget: int | float | str,
    **options: Unpack[StepOptions],
) -> int:
    """The most images of a training step that fit into a budget, in whatever memory modes that takes.

    Args:
        model: as for :func:`plan_memory`, like all others.

    Returns:
        The number of images; 0 if one alone is too many.
    """
    check_module("largest_batch", model)
    measured = _Measured.of("largest_batch", model, input_shape, options)
    return measured.largest_batch(read_budget("largest_batch", budget, measured.setting.device))


def memory_front(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    batch_size: int,
    **options: Unpack[StepOptions],
) -> list[tuple[int, float]]:
    """Peak in bytes and seconds of a training step, for every choice of modes that no other one beats in both.

    Args:
        model: as for :func:`plan_memory`, like all others.

    Returns:
        From the largest peak to the smallest.
    """
    check_module("memory_front", model)
    _check_batch_size("memory_front", batch_size)
    return _Measured.of("memory_front", model, input_shape, options).front(batch_size)


def _check_batch_size(op: str, batch_size: int) -> None:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"{op}: expected batch_size to be an integer of at least 1, got {batch_size!r}")


# What was measured of a model, as long as it lives; see _Measured.of.
_KNOWN: "weakref.WeakKeyDictionary[nn.Module, dict[Any, _Measured]]" = weakref.WeakKeyDictionary()


class _Measured:
    """Steps of a model in each mode, at small batch sizes."""

    def __init__(self, op: str, model: nn.Module, setting: StepSetting, exact: bool) -> None:
        self.model = weakref.ref(model)
        self.setting = setting
        self.blocks = [block._replace(modes=_choice(block, exact)) for block in fused_blocks(model)]
        if not self.blocks:
            raise ValueError(f"{op}: expected model to have fused blocks, got none; {CALL_CONVERT}")
        self._steps: dict[tuple[Any, ...], Step] = {}

    @classmethod
    def of(cls, op: str, model: nn.Module, input_shape: Sequence[int], options: StepOptions) -> "_Measured":
        """What is known of the model as it is now, or nothing yet."""
        setting = StepSetting.of(op, model, input_shape, options)
        parameters = tuple((p.data_ptr(), p.dtype, p.requires_grad) for p in model.parameters())
        modules = tuple((type(module), module.training) for module in model.modules())
        key = (setting.shape, setting.device, torch.get_num_threads(), parameters, modules, *sorted(options.items()))
        known = _KNOWN.setdefault(model, {})
        if key not in known:
            known.clear()
            known[key] = cls(op, model, setting, options.get("exact", True))
        return known[key]

    def step(self, modes: dict[str, str], batch: int) -> Step:
        """A step in these modes."""
        if batch <= BATCHES[1]:
            return self._measured_step(modes, batch)
        small, large = (self._measured_step(modes, run) for run in BATCHES)
        return extrapolate_step(small, large, BATCHES, batch)

    def _measured_step(self, modes: dict[str, str], batch: int) -> Step:
        key = (batch, *sorted(modes.items()))
        if key not in self._steps:
            self._steps[key] = self._run(modes, batch)
        return self._steps[key]

    def _run(self, modes: dict[str, str], batch: int) -> Step:
        model = self.model()
        if model is None:
            raise ValueError("plan_memory: the model is gone")
        twin = set_memory(copied(model).to(self.setting.device), modes)  # type: ignore[arg-type]
        names = names_of_blocks(twin)
        with self.setting.running(batch) as x:
            if not self.setting.measure:
                return run_step(twin, x, self.setting.loss, names, measure=False)
            _, *runs = [run_step(twin, x, self.setting.loss, names) for _ in range(3)]  # the first is colder
        return quickest(runs)

    def problem(self, batch: int) -> Problem:
        """The choice at a batch size."""
        every = dict.fromkeys(mode for block in self.blocks for mode in block.modes)
        steps = {
            mode: self.step({b.name: mode if mode in b.modes else b.modes[0] for b in self.blocks}, batch)
            for mode in every
        }
        modes_of = {block.name: block.modes for block in self.blocks}
        first = next(iter(steps.values()))
        return pose(steps, [modes_of[unit[0]] for unit in first.units])

    def step_of(self, problem: Problem, chosen: Sequence[str], batch: int) -> Step:
        """A step with a mode for each unit. Its peak may be less than the sum of its parts: some hold their input for
        one another, and where modes change they do not."""
        units = zip(problem.units, chosen, strict=True)
        return self.step({name: mode for unit, mode in units for name in unit}, batch)

    def fits(self, batch: int, budget: int) -> bool:
        """Whether the modes with the least peak fit."""
        problem = self.problem(batch)
        chosen = cheapest(problem, least_peak(problem))
        assert chosen is not None
        return self.setting.fixed_bytes(batch) + self.step_of(problem, chosen, batch).peak <= budget

    def largest_batch(self, budget: int) -> int:
        """The most images that fit."""
        if not self.fits(2, budget):  # one image alone may be too few for a batch norm
            return 1 if self.fits(1, budget) else 0
        low, high = 2, 4
        while high < _MOST_IMAGES and self.fits(high, budget):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle, budget) else (low, middle)
        return low

    def plan(self, batch: int, budget: int | float | str) -> MemoryPlan:
        """The plan for a budget."""
        most = read_budget("plan_memory", budget, self.setting.device)
        problem, fixed = self.problem(batch), self.setting.fixed_bytes(batch)
        chosen = cheapest(problem, most - fixed)
        room = most - fixed
        while chosen is not None and fixed + self.step_of(problem, chosen, batch).peak > most:
            room -= fixed + self.step_of(problem, chosen, batch).peak - most
            chosen = cheapest(problem, room)
        if chosen is None:  # what looks too large may fit where modes change
            near = {modes: self.step_of(problem, modes, batch) for modes in pareto_front(problem)}
            fitting = [modes for modes, step in near.items() if fixed + step.peak <= most]
            if not fitting:
                raise self._too_small(batch, fixed + min(step.peak for step in near.values()), most)
            chosen = min(fitting, key=lambda modes: near[modes].seconds)
        step = self.step_of(problem, chosen, batch)
        rows = tuple(_row(*of_unit) for of_unit in zip(problem.units, problem.options, chosen, strict=True))
        return MemoryPlan(rows, batch, most, fixed + step.peak, fixed, step.seconds, self.model)

    def front(self, batch: int) -> list[tuple[int, float]]:
        """Peak in bytes and seconds of a step, for every choice of modes that no other beats in both."""
        problem, fixed = self.problem(batch), self.setting.fixed_bytes(batch)
        steps = [self.step_of(problem, chosen, batch) for chosen in pareto_front(problem)]
        points: list[tuple[int, float]] = []
        for point in sorted((fixed + step.peak, step.seconds) for step in steps):
            if not points or point[1] < points[-1][1]:
                points.append(point)
        return points[::-1]

    def _too_small(self, batch: int, least: int, budget: int) -> InsufficientMemory:
        fits = self.largest_batch(budget)
        return InsufficientMemory(
            f"plan_memory: a batch of {batch} needs at least {show_bytes(least)}, "
            f"got a budget of {show_bytes(budget)}; "
            + (f"the largest batch that fits is {fits}" if fits else "not even one image fits"),
            least,
            fits,
        )


def _choice(block: Block, exact: bool) -> tuple[str, ...]:
    """The modes that a plan chooses from."""
    if block.is_fixed:
        return (block.memory,)
    return tuple(mode for mode in block.modes if mode != "reversible" or not exact)


def _row(unit: tuple[str, ...], options: Sequence[Any], chosen: str) -> PlanRow:
    kept = {option.memory: option.kept for option in options}
    seconds = {option.memory: option.seconds for option in options}
    return PlanRow(unit, chosen, kept[chosen], seconds[chosen], kept, seconds)

# SPDX-License-Identifier: Apache-2.0
"""The cheapest memory modes within a budget, by dynamic programming over the units of a training step.

While unit i runs forward, or backward, in use are: what the step began with, what the units in front of it keep, and
its own peak. Of the units behind it nothing is left when it runs backward, but gradients of parameters, which are the
same in every mode. So all that a choice for the first i units passes on is one number, what they keep; of two choices
the one that keeps and takes more is never better.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastdense.memory.tape import Part, Step


class Option(NamedTuple):
    """A unit in one mode."""

    memory: str
    forward: Part
    backward: Part

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward.seconds

    @property
    def kept(self) -> int:
        """Bytes that are in use between the two passes."""
        return self.forward.net


class Problem(NamedTuple):
    """For each unit its options, and what happens between the passes."""

    units: tuple[tuple[str, ...], ...]
    options: tuple[tuple[Option, ...], ...]
    turn: Part


def pose(steps: Mapping[str, Step], modes: Sequence[Sequence[str]]) -> Problem:
    """The choice between the modes of each unit, from steps in which all units have one mode.

    Args:
        steps: by mode; units without that mode run in another one of theirs.
        modes: of each unit.
    """
    first = next(iter(steps.values()))
    options = tuple(
        tuple(Option(mode, steps[mode].forward[at], steps[mode].backward[at]) for mode in steps if mode in modes[at])
        for at in range(len(first.units))
    )
    return Problem(first.units, options, first.turn)


class _State(NamedTuple):
    kept: int
    seconds: float
    peak: int
    chosen: tuple[int, ...]


def cheapest(problem: Problem, budget: float) -> tuple[str, ...] | None:
    """The modes of the least time whose peak is at most ``budget`` bytes above the beginning; None if none fit."""
    states = _choose(problem, budget)
    if not states:
        return None
    best = min(states, key=lambda state: state.seconds)
    return tuple(options[at].memory for options, at in zip(problem.options, best.chosen, strict=True))


def pareto_front(problem: Problem) -> list[tuple[str, ...]]:
    """The choices that no other beats in both peak and time, from the largest peak to the smallest."""
    front: list[tuple[str, ...]] = []
    budget = float("inf")
    while states := _choose(problem, budget):
        best = min(states, key=lambda state: (state.seconds, state.peak))
        front.append(tuple(options[at].memory for options, at in zip(problem.options, best.chosen, strict=True)))
        budget = best.peak - 1
    return front


def least_peak(problem: Problem) -> int:
    """The smallest peak that any choice has."""
    low, high = 0, max(state.peak for state in _choose(problem, float("inf")))
    while low < high:
        middle = (low + high) // 2
        states = _choose(problem, middle)
        if states:
            high = min(state.peak for state in states)
        else:
            low = middle + 1
    return high


def _choose(problem: Problem, budget: float) -> list[_State]:
    # What the units behind each one leave when they have run backward.
    behind = [0]
    for options in problem.options[::-1]:
        behind.append(behind[-1] + max(option.forward.net + option.backward.net for option in options))
    behind = [left + problem.turn.net for left in behind[-2::-1]]
    states = [_State(0, 0.0, 0, ())]
    for options, left in zip(problem.options, behind, strict=True):
        states = [
            _State(
                state.kept + option.kept,
                state.seconds + option.seconds,
                max(
                    state.peak,
                    state.kept + option.forward.peak,
                    state.kept + option.kept + left + option.backward.peak,
                ),
                (*state.chosen, at),
            )
            for state in states
            for at, option in enumerate(options)
        ]
        states = _undominated([state for state in states if state.peak <= budget])
    at_the_turn = (state._replace(peak=max(state.peak, state.kept + problem.turn.peak)) for state in states)
    return [state for state in at_the_turn if state.peak <= budget]


def _undominated(states: list[_State]) -> list[_State]:
    """Without those that keep and take no less than another one, whose peak may be as it likes: it is in the budget."""
    kept: list[_State] = []
    for state in sorted(states):
        if not kept or state.seconds < kept[-1].seconds:
            kept.append(state)
    return kept

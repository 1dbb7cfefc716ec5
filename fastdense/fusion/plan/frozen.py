# SPDX-License-Identifier: Apache-2.0
"""Weights that a frozen block, or a stage of dual path blocks, keeps folded and packed."""

from __future__ import annotations

import functools
import weakref
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastdense._C import WeightVersions
from fastdense.ops.arguments import PackedWeights
from fastdense.ops.dense_block import FlatBlock
from fastdense.ops.dual_path import FlatStage

Flat = FlatBlock | FlatStage


class FrozenWeights(NamedTuple):
    """The packed weights of a block or a stage, and what they were packed from."""

    flat: Flat
    norms: list[Any]
    packed: PackedWeights
    dtype: torch.dtype
    versions: WeightVersions

    def hold(self) -> bool:
        """Whether nothing has been written to the weights since."""
        return self.versions.hold(watched(self.flat, self.norms))

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


def watched(flat: Flat, norms: list[Any]) -> list[Any]:
    """Tensors whose versions tell whether packed weights are still right: the weights, and what norms count steps with.

    Running statistics keep their versions where a training step moves them, in torch and here.
    """
    return [*flat.weights, *(norm.__dict__["_buffers"].get("num_batches_tracked") for norm in norms)]


class Freezer:
    """Holds the frozen weights of a module, for its state and for its plans.

    Plans do not hold the state itself, which holds them: a model is freed at once, without a search for circles.
    """

    def __init__(self) -> None:
        self.kept: FrozenWeights | None = None

    def freeze(self, frozen: FrozenWeights) -> None:
        """Keeps packed weights until something tells that they are not what they were."""
        self.kept = frozen
        _freezers.add(self)
        _watch_optimizers()

    def packed(self, flat: Flat, dtype: torch.dtype) -> PackedWeights | None:
        """The packed weights of a plan, in its type; None where anything is not what it was."""
        kept = self.kept
        if kept is None or kept.dtype != dtype or len(kept.flat.weights) != len(flat.weights):  # the block alone
            return None
        if kept.flat is not flat and _are_equal(kept.flat, flat):  # modules were read anew
            self.kept = kept = kept._replace(flat=flat)
        if kept.flat is not flat or not kept.hold():
            self.kept = None
            return None
        return kept.packed

    def nbytes(self, flat: Flat) -> int:
        """Bytes of packed weights that are of use to a plan."""
        kept = self.kept
        if kept is None or len(kept.flat.weights) != len(flat.weights) or not _are_equal(kept.flat, flat):
            return 0
        return kept.nbytes if kept.hold() else 0


# Those that have frozen something.
_freezers: weakref.WeakSet[Freezer] = weakref.WeakSet()


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Thaws what has parameters of the optimizer: fused ones write them without a new version."""
    frozen = [(freezer, freezer.kept) for freezer in list(_freezers) if freezer.kept is not None]
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]} if frozen else set()
    for freezer, kept in frozen:
        if any(id(weight) in stepped for weight in kept.flat.weights):
            freezer.kept = None


def _are_equal(first: Flat, second: Flat) -> bool:
    same = all(a is b for a, b in zip(first.weights, second.weights, strict=True))
    return same and first._replace(weights=[]) == second._replace(weights=[])

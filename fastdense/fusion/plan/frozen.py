# SPDX-License-Identifier: Apache-2.0
"""Weights that a frozen block keeps folded and packed."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastdense._C import WeightVersions
from fastdense.ops.dense_block import FlatBlock
from fastdense.ops.dense_block_inference import PackedBlock


class FrozenWeights(NamedTuple):
    """The packed weights of a block, and what they were packed from."""

    flat: FlatBlock
    packed: PackedBlock
    dtype: torch.dtype
    versions: WeightVersions

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


class Freezer:
    """Holds the frozen weights of a module, for its state and for its plans.

    Plans do not hold the state itself, which holds them: a model is freed at once, without a search for circles.
    """

    def __init__(self) -> None:
        self.kept: FrozenWeights | None = None

    def packed(self, flat: FlatBlock, dtype: torch.dtype) -> PackedBlock | None:
        """The packed weights of a plan, in its type; None where anything is not what it was."""
        kept = self.kept
        if kept is None or kept.dtype != dtype or len(kept.flat.weights) != len(flat.weights):  # the block alone
            return None
        if kept.flat is not flat and _are_equal(kept.flat, flat):  # modules were read anew
            self.kept = kept = kept._replace(flat=flat)
        if kept.flat is not flat or not kept.versions.hold():
            self.kept = None
            return None
        return kept.packed

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights that are of use."""
        kept = self.kept
        return kept.nbytes if kept is not None and kept.versions.hold() else 0


def _are_equal(first: FlatBlock, second: FlatBlock) -> bool:
    same = all(a is b for a, b in zip(first.weights, second.weights, strict=True))
    return same and first._replace(weights=[]) == second._replace(weights=[])

# SPDX-License-Identifier: Apache-2.0
"""Small stems: norm, ReLU and max pool with random parameters."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdense import reference
from fastdense.ops import norm_relu_max_pool
from tests.cases.random_block import RandomBlock

ALL = ("norm",)


@dataclass(frozen=True)
class Case:
    """A small stem; ``kernel``, ``stride`` and ``padding`` are a pool's."""

    batch: int = 3
    channels: int = 5
    size: tuple[int, ...] = (9, 7)
    kernel: tuple[int, ...] = (3, 3)
    stride: tuple[int, ...] = (2, 2)
    padding: tuple[int, ...] = (1, 1)
    channels_last: bool = False
    frozen: tuple[str, ...] = ()
    affine: bool = True
    dtype: torch.dtype = torch.float64
    device: str = "cpu"


def in_layout(t: Tensor, channels_last: bool) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else t.contiguous()


class Stem(RandomBlock):
    """Random parameters of a case, and both implementations."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(case, seed)
        self.weights = self.norm("norm", case.channels, 1e-3)
        if case.affine:
            with torch.no_grad():
                self.weights.weight[::2] *= -1  # a maximum is then a minimum of the input
        x = self.normal(case.batch, case.channels, *case.size) + 0.5
        self.input = in_layout(x, case.channels_last).requires_grad_()
        self.pool = case.kernel, case.stride, case.padding

    def run(self, memory: str | None = None) -> Any:
        return norm_relu_max_pool(self.input, self.weights, *self.pool, process_group=self.process_group)

    def expected(self) -> Any:
        return reference.norm_relu_max_pool(self.input, self.weights, *self.pool)

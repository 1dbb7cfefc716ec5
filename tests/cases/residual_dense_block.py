# SPDX-License-Identifier: Apache-2.0
"""Small residual dense blocks with random parameters."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from fastdense.ops import ConvWeights, residual_dense_block


class Case(NamedTuple):
    channels: int = 5
    growth: int = 3
    layers: int = 3
    kernel: int = 3
    size: tuple[int, int] = (6, 7)
    slope: float = 0.2
    outer: bool = False
    bias: bool = True
    batch: int = 2
    fusion: bool = True
    first: tuple[int, ...] | None = None  # channel that each layer reads


class Block:
    """Arguments of one case."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, dtype=torch.float64) * scale).to(device, dtype).requires_grad_()

        def conv(inputs: int, outputs: int, kernel: int) -> ConvWeights:
            weight = normal(outputs, inputs, kernel, kernel, scale=(inputs * kernel**2) ** -0.5)
            return ConvWeights(weight, normal(outputs) if case.bias else None)

        c, k = case.channels, case.growth
        first = case.first or [0] * case.layers
        self.layers = [conv(c + at * k - first[at], k, 3) for at in range(case.layers)]
        self.fusion = conv(c + case.layers * k, c, case.kernel) if case.fusion else None
        self.input = normal(case.batch, c, *case.size)
        self.outer = normal(case.batch, c, *case.size) if case.outer else None
        self.options = {"negative_slope": case.slope, "scale": 0.3, "outer_scale": 0.7, "first_channels": case.first}

    def convs(self) -> list[ConvWeights]:
        return [*self.layers] if self.fusion is None else [*self.layers, self.fusion]

    def tensors(self) -> list[Tensor]:
        all_of = [self.input, self.outer, *(w for conv in self.convs() for w in conv)]
        return [t for t in all_of if t is not None]

    def run(self, run=residual_dense_block) -> Tensor:
        return run(self.input, self.layers, self.fusion, outer=self.outer, **self.options)

    def to(self, dtype: torch.dtype) -> "Block":
        other = copy.copy(self)

        def cast(t):
            return None if t is None else t.detach().to(dtype).requires_grad_()

        other.input, other.outer = cast(self.input), cast(self.outer)
        other.layers = [ConvWeights(*map(cast, conv)) for conv in self.layers]
        other.fusion = None if self.fusion is None else ConvWeights(*map(cast, self.fusion))
        return other


def ramp(like: Tensor) -> Tensor:
    """Made on the device, which a copy would wait for."""
    return torch.linspace(-1, 1, like.numel(), dtype=torch.float64, device=like.device).view(like.shape).to(like.dtype)


def results(block: Block, run=residual_dense_block) -> list[Tensor]:
    """Output and all gradients."""
    out = block.run(run)
    weights = ramp(out)
    return [out, *torch.autograd.grad(out, block.tensors(), weights)]

# SPDX-License-Identifier: Apache-2.0
"""Pairs of a plain block of any layers and a copy on a shared buffer, and a step of either."""

import copy

import torch
from torch import nn

import fastdense
from fastdense.fusion.shared_buffer.block import SharedBuffer
from tests.cases.any_layers import C0, Block
from tests.cases.converted import randomise, step

SCALE = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))  # of no module


def pair(block=Block, dtype=torch.float64, **options) -> tuple[nn.Module, nn.Module]:
    """The plain block behind a convolution, and a copy on a shared buffer."""
    torch.manual_seed(0)
    dims = options.get("dims", 2)
    stem = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, C0, 1)
    plain = randomise(nn.Sequential(stem, block(**options)).to(dtype))
    fast = fastdense.convert(copy.deepcopy(plain), memory="min")
    assert is_shared(fast)
    return plain, fast


def is_shared(net: nn.Module) -> bool:
    """Whether a step of the network saves its block's output, and of the block nothing else that grows with it."""
    return isinstance(net[1], SharedBuffer) and [row.runs for row in fastdense.report(net).rows] == ["shared buffer"]


def images(dims: int = 2, dtype=torch.float64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *(7, 6, 5)[:dims], dtype=dtype)


def seeded_step(net: nn.Module, x: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    made = step(net, x, **options)
    return made | {"random state": torch.get_rng_state()}

# SPDX-License-Identifier: Apache-2.0
"""Images to resample, and what the reference makes of them."""

import numpy
import torch
from torch import Tensor

from fastdense import reference
from fastdense.ops.bicubic import PRESETS

SHAPES = [((13, 17), (29, 40)), ((40, 33), (11, 9)), ((16, 16), (32, 7)), ((3, 70), (3, 71)), ((1, 9), (5, 4))]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def expected(x: Tensor, size, preset: str) -> Tensor:
    known = PRESETS[preset]
    steps = [n / m for n, m in zip(x.shape[2:], size, strict=True)]
    return reference.bicubic(x, size, steps, known.a, known.antialias, known.border, False)


def photograph() -> numpy.ndarray:
    return numpy.random.default_rng(0).integers(0, 256, (61, 47, 3), dtype=numpy.uint8)


def as_batch(image: numpy.ndarray) -> Tensor:
    return torch.from_numpy(image).movedim(-1, 0)[None]

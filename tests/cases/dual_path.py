# SPDX-License-Identifier: Apache-2.0
"""Small dual path stages with random parameters."""

from dataclasses import dataclass

import torch

from fastdense import reference
from fastdense.ops import DualPathWeights, ProjectionWeights, dual_path_stage
from tests.cases.random_block import RandomBlock


@dataclass(frozen=True)
class StageCase:
    """A small stage; without a projection the input has `residual_channels + first_dense` channels."""

    num_blocks: int = 3
    residual_channels: int = 6
    growth_rate: int = 4
    first_dense: int = 5
    in_channels: int = 7
    width: int = 6
    width_behind: int = 9
    groups: int = 3
    projection: bool = True
    stride: int = 1
    batch: int = 3
    size: tuple[int, ...] = (7, 5)
    frozen: tuple[str, ...] = ()
    affine: bool = True
    dtype: torch.dtype = torch.float64
    memory: str = "balanced"
    device: str = "cpu"


class Stage(RandomBlock):
    """Random parameters of a case, and both implementations."""

    def __init__(self, case: StageCase, seed: int = 0) -> None:
        super().__init__(case, seed)
        one, kernel = [1] * len(case.size), [3] * len(case.size)
        read = case.residual_channels + case.first_dense
        channels = case.in_channels if case.projection else read
        self.input = (self.normal(case.batch, channels, *case.size) + 0.5).requires_grad_()
        self.projection = None
        if case.projection:
            norm = self.norm("projection.norm", channels, 1e-3)
            self.projection = ProjectionWeights(norm, self.weight("projection.conv", read, channels, *one))
        self.blocks = []
        for index in range(case.num_blocks):
            out = case.residual_channels + case.growth_rate
            self.blocks.append(
                DualPathWeights(
                    self.norm(f"{index}.norm_a", channels, 1e-3),
                    self.weight(f"{index}.conv_a", case.width, channels, *one),
                    self.norm(f"{index}.norm_b", case.width, 1e-4),
                    self.weight(f"{index}.conv_b", case.width_behind, case.width // case.groups, *kernel),
                    self.norm(f"{index}.norm_c", case.width_behind, 1e-5),
                    self.weight(f"{index}.conv_c", out, case.width_behind, *one),
                )
            )
            channels = read + (index + 1) * case.growth_rate

    def arguments(self) -> dict:
        case = self.case
        return {"residual_channels": case.residual_channels, "projection": self.projection, "stride": case.stride}

    def run(self, memory: str | None = None):
        memory = memory or self.case.memory
        return dual_path_stage(
            self.input, self.blocks, memory=memory, process_group=self.process_group, **self.arguments()
        )

    def expected(self):
        return reference.dual_path_stage(self.input, self.blocks, **self.arguments())

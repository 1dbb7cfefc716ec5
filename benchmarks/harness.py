# SPDX-License-Identifier: Apache-2.0
"""What the micro-benchmarks share: workloads, equality before timing, the variants side by side."""

import copy
import dataclasses

import torch
from torch import Tensor, nn

import fastdense


@dataclasses.dataclass(frozen=True)
class Workload:
    """A dense block on a batch of feature maps ``[batch, in_channels, side, side]``."""

    name: str
    num_layers: int
    in_channels: int
    growth_rate: int
    batch: int
    side: int


WORKLOADS = (
    Workload("densenet121-block1", 6, 64, 32, 4, 56),
    Workload("densenet121-block3", 24, 256, 32, 8, 14),
    Workload("cifar-bc100-block1", 16, 24, 12, 16, 32),
)

VARIANTS = ("plain", "plain-channels-last", "balanced", "min")


class Step:
    """Forward and backward of one block in one variant."""

    def __init__(self, workload: Workload, variant: str) -> None:
        torch.manual_seed(0)
        w = workload
        block = fastdense.nn.DenseBlock(w.num_layers, w.in_channels, w.growth_rate)
        self.input = torch.randn(w.batch, w.in_channels, w.side, w.side)
        if variant != "plain":
            self.input = self.input.to(memory_format=torch.channels_last)
        if variant.startswith("plain"):
            fastdense.restore(block)
            if variant == "plain-channels-last":
                block = block.to(memory_format=torch.channels_last)
        else:
            fastdense.convert(block, memory=variant)
        self.block: nn.Module = copy.deepcopy(block)
        self.input.requires_grad_()
        self.grad = torch.ones_like(self.block(self.input))

    def __call__(self) -> Tensor:
        out = self.block(self.input)
        out.backward(self.grad)
        return out.detach()

    def forward(self) -> Tensor:
        with torch.inference_mode():
            return self.block(self.input)


def check_equal(workload: Workload, variant: str) -> None:
    """A wrong result is not timed: output and input gradient must be those of plain PyTorch."""
    expected, actual = Step(workload, "plain"), Step(workload, variant)
    torch.testing.assert_close(actual(), expected(), rtol=1e-3, atol=1e-3)
    assert actual.input.grad is not None
    assert expected.input.grad is not None
    difference = (actual.input.grad - expected.input.grad).norm() / expected.input.grad.norm()
    assert difference < 1e-3, f"{variant}: gradients differ by {difference:.1e}"

# SPDX-License-Identifier: Apache-2.0
"""A small module around every native operator, and all that one training step of it makes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastdense import bicubic_resize
from fastdense.nn import DenseBlock, DenseFeatures, DualPathStage, HighwayConv2d, ResidualDenseBlock, Transition
from fastdense.ops import mean_join
from tests.cases.converted import randomise

SHAPE = (2, 10, 9, 8)


class Function(nn.Module):
    """An operator without parameters."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def dense(memory: str, drop_rate: float = 0.0, bottleneck: bool = True) -> nn.Module:
    block = DenseBlock(3, 10, 4, bn_size=2, drop_rate=drop_rate, memory=memory, bottleneck=bottleneck)
    return DenseFeatures(block, Transition(block.out_channels, 7))


def dual_path(memory: str) -> nn.Module:
    return DualPathStage(2, 10, 6, 8, 3, groups=2, projection=True, stride=2, memory=memory)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "dense block": lambda: dense("balanced"),
    "dense block, min": lambda: dense("min", drop_rate=0.3),
    "dense block without bottleneck": lambda: dense("balanced", bottleneck=False),
    "dual path stage": lambda: dual_path("balanced"),
    "dual path stage, min": lambda: dual_path("min"),
    "dual path stage, reversible": lambda: dual_path("reversible"),
    "residual dense block": lambda: ResidualDenseBlock(10, 6, 2),
    "highway gate": lambda: HighwayConv2d(10),
    "mean join": lambda: Function(lambda x: mean_join(list(x.chunk(5, 1)))),
    "bicubic": lambda: Function(lambda x: bicubic_resize(x, (21, 5), preset="matlab")),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A module in training and its input."""
    torch.manual_seed(0)
    return randomise(MODULES[name]()).to(dtype), torch.randn(SHAPE).to(dtype)


def step(module: nn.Module, x: Tensor, forwarded: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """Output, gradients and buffers of a training step, from a fixed seed; `forwarded` is called in between."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    out = module(x)
    forwarded()
    parameters = dict(module.named_parameters())
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    grads = torch.autograd.grad(out, [x, *parameters.values()], grad)
    made = {"out": out.detach()} | dict(zip(["input", *parameters], grads, strict=True))
    return made | {f"buffer {name}": b.clone() for name, b in module.named_buffers()}


def differences(made: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of what is not bit-equal; NaN equals nothing."""
    assert made.keys() == expected.keys()
    return [name for name in made if not torch.equal(made[name], expected[name])]

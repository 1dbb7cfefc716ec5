# SPDX-License-Identifier: Apache-2.0
"""Small dense blocks with random parameters."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdense import reference
from fastdense.ops import Activation, LayerWeights, TailWeights, dense_block
from tests.cases.random_block import RandomBlock

# Small enough for several chunks of pixels in most cases.
EMULATED_SCRATCH = 12 << 10


@dataclass(frozen=True)
class Case:
    """A small block; `tail` names what reads it."""

    batch: int = 3
    in_channels: int = 10
    growth_rate: int = 6
    num_layers: int = 3
    width: int = 20  # of the bottleneck, 0 for none
    size: tuple[int, ...] = (7, 5)
    tail: str = "none"
    frozen: tuple[str, ...] = ()
    affine: bool = True
    dtype: torch.dtype = torch.float64
    drop_rate: float = 0.0
    memory: str = "balanced"
    active: tuple[bool, ...] | None = None
    device: str = "cpu"
    acts: tuple[Activation, ...] = ()  # of the norms, in turn
    slopes: int = 0  # of PReLU: 1, or 0 for one a channel
    bias: bool = False
    norm_groups: int = 0  # see RandomBlock


class Block(RandomBlock):
    """Random parameters of a case, and both implementations."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(case, seed)
        dims = len(case.size)
        kernel, one = [3] * dims, [1] * dims
        self.layers = []
        self.norms = 0
        for index in range(case.num_layers):
            channels = case.in_channels + index * case.growth_rate
            fan = case.width or channels
            self.layers.append(
                LayerWeights(
                    self.norm(f"{index}.norm1", channels, 1e-5 * (index + 1)),
                    self.weight(f"{index}.conv1", case.width, channels, *one) if case.width else None,
                    self.norm(f"{index}.norm2", case.width, 1e-3) if case.width else None,
                    self.weight(f"{index}.conv2", case.growth_rate, fan, *kernel),
                    self.act(f"{index}.act1", channels),
                    self.act(f"{index}.act2", case.width) if case.width else Activation(),
                    self.bias(f"{index}.conv1.bias", case.width) if case.width else None,
                    self.bias(f"{index}.conv2.bias", case.growth_rate),
                )
            )
        channels = case.in_channels + case.num_layers * case.growth_rate
        self.tail = None
        if case.tail != "none":
            norm = self.norm("tail.norm", channels, 1e-5)
            conv = self.weight("tail.conv", 7, channels, *one) if case.tail == "transition" else None
            act = self.act("tail.act", channels) if case.tail != "norm" else Activation()
            bias = self.bias("tail.conv.bias", 7) if case.tail == "transition" else None
            self.tail = TailWeights(norm, conv, case.tail == "norm_relu", act, bias)
        shape = (case.batch, case.in_channels, *case.size)
        self.input = (self.normal(*shape) + 0.5).requires_grad_()
        self.seed = torch.tensor(1234, device=case.device)

    def act(self, name: str, channels: int) -> Activation:
        """The next one; PReLU gets a parameter."""
        if not self.case.acts:
            return Activation()
        act = self.case.acts[self.norms % len(self.case.acts)]
        self.norms += 1
        if act.name != "prelu":
            return act
        return act._replace(weight=self.add(f"{name}.weight", self.normal(self.case.slopes or channels) * 0.3 + 0.2))

    def bias(self, name: str, channels: int) -> Tensor | None:
        return self.add(name, self.normal(channels)) if self.case.bias else None

    def run(self, memory: str | None = None):
        return dense_block(
            self.input,
            self.layers,
            tail=self.tail,
            drop_rate=self.case.drop_rate,
            seed=self.seed,
            memory=memory or self.case.memory,
            process_group=self.process_group,
            active=self.case.active,
        )

    def expected(self):
        return reference.dense_block(
            self.input,
            self.layers,
            tail=self.tail,
            drop_rate=self.case.drop_rate,
            seed=self.seed,
            active=self.case.active,
        )


ALL = ("norm1", "norm2", "tail")

# Numbers that float32 has as well: torch rounds the alpha of CELU to it in the backward pass.
ACTIVATIONS = (
    Activation("relu"),
    Activation("identity"),
    Activation("relu6"),
    Activation("leaky_relu", 0.1),
    Activation("prelu"),
    Activation("elu", 1.3),
    Activation("celu", 0.75),
    Activation("selu"),
    Activation("silu"),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("hardswish"),
    Activation("mish"),
    Activation("softplus", 2.0, 3.0),
    Activation("tanh"),
    Activation("sigmoid"),
)

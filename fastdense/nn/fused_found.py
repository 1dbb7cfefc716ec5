# SPDX-License-Identifier: Apache-2.0
"""The mixin that runs a dense block of an unknown class as one operator."""

from typing import Any

from torch import Tensor

from fastdense.nn.found_structure import read_found_block
from fastdense.nn.fused import FusedDenseBlock, plain_class, run_block
from fastdense.nn.structure import Tail


class FusedFoundBlock(FusedDenseBlock):
    """A dense block whose code a trial has shown to be one; called with anything but one tensor, its own code runs."""

    def run(self, input: Tensor, tail: Tail | None) -> Tensor:
        block = read_found_block(self)
        return run_block(input, block.layers, tail, self.memory, newest_first=block.newest_first)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if named or len(inputs) != 1 or isinstance(inputs[0], list | tuple):
            return plain_class(type(self)).forward(self, *inputs, **named)
        return super().forward(inputs[0])

    run_forward = forward

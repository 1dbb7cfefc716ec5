# SPDX-License-Identifier: Apache-2.0
"""The mixin that runs the layers of a dense block, whatever they compute, on one buffer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastdense.fusion.base import (
    FusedModule,
    check_no_transforms,
    fall_back,
    find_wrapped,
    is_traced,
    plan_of,
    run_plain,
)
from fastdense.fusion.checks import NotFusible
from fastdense.fusion.plan.kept import IN_TURN
from fastdense.fusion.plan.state import plain_class, state_of
from fastdense.fusion.shared_buffer.function import run_layers
from fastdense.fusion.shared_buffer.layers import Block, Form, read_layers
from fastdense.fusion.shared_buffer.reruns import OF_A_GRAPH, Owners, needs_gradient, runs_without_numbers
from fastdense.fusion.shared_buffer.trial import read_shared_block


class SharedBuffer(FusedModule):
    """A dense block that saves its output for the backward pass, and runs its layers again there.

    Without gradients the plain modules run. So they do under ``torch.compile``: the compiler chooses what to save.
    """

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if named or len(inputs) != 1 or isinstance(inputs[0], list | tuple):
            return plain_class(type(self)).forward(self, *inputs, **named)
        return run_shared(self, read_shared_block, inputs[0])


class SharedBufferLayers(SharedBuffer):
    """The same of this library's own class, whose layers need no check: its plain forward is known."""

    def forward(self, input: Any) -> Any:
        return run_shared(self, read_own_layers, input)


def read_own_layers(module: nn.Module) -> Block:
    layers: Any = module._modules["layers"]
    return read_layers(layers.named_children(), Form())


def run_shared(module: nn.Module, read: Callable[[nn.Module], Block], input: Any) -> Any:
    """The forward of such a block, whose layers ``read`` finds."""
    if wrapped := find_wrapped(input):
        return torch.overrides.handle_torch_function(run_shared, wrapped, module, read, input)
    if torch.compiler.is_compiling() or is_traced(input) or not isinstance(input, torch.Tensor):
        return run_plain(module, input)
    with IN_TURN:
        if input.is_inference() or not torch.is_grad_enabled():
            return run_plain(module, input)
        try:
            check_no_transforms()
            block = plan_of(module, read)
            owners = _owners(module)
        except NotFusible as reason:
            return fall_back(module, reason, input)
        for head in block.heads:
            input = head(input)
        if not needs_gradient(input, block.parameters):
            return _without_gradient(block, input)
        return run_layers(block, input, owners)


def _owners(module: nn.Module) -> Owners:
    kept = state_of(module).kept
    if kept is not None and kept.plan is not None:
        return Owners((module,), kept.modules, kept.sources)
    if runs_without_numbers():
        return Owners((module,))
    raise NotFusible(OF_A_GRAPH)


def _without_gradient(block: Block, input: torch.Tensor) -> torch.Tensor:
    features = [input]
    for layer in block.layers:
        out = layer.module(*block.form.arguments(features))
        features = block.form.with_new(features, out)
    return block.form.joined(features)

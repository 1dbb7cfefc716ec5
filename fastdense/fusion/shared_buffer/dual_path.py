# SPDX-License-Identifier: Apache-2.0
"""Runs dual path stages of any norms and activations on one buffer, as plain modules, with linear memory.

    block l reads [r_l; d_1 ... d_l] and makes z_l:   r_{l+1} = r_l + z_l[:R],   d_{l+1} = z_l[R:]

A stage is one autograd function. It saves its output [r; d], its input, and ``r_l`` of all blocks but the first, which
is all that later blocks change. The backward pass has one gradient of the output's size. From the last block to the
first, ``z_l`` is made again with gradients; both paths hand their gradient on where it is, and what the block gives is
added. The first block may project its input to both paths, and that is made again as well.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdense._C import Fingerprint
from fastdense.fusion.base import run_plain
from fastdense.fusion.checks import NotFusible, check_no_global_hooks, child
from fastdense.fusion.dual_path_layers import split_of
from fastdense.fusion.equivalence import double_copy, isolated, random_input
from fastdense.fusion.plan.code import Sources
from fastdense.fusion.plan.kept import read_sources
from fastdense.fusion.plan.outcome import tried
from fastdense.fusion.plan.state import state_of
from fastdense.fusion.shared_buffer.layers import Form, Layer, distinct_parameters, first_convolution, read_layer
from fastdense.fusion.shared_buffer.reruns import (
    OF_A_GRAPH,
    Owners,
    Read,
    Reruns,
    Run,
    SharedBuffer,
    runs_without_numbers,
)
from fastdense.fusion.shared_buffer.shortcuts import End, Watch
from fastdense.fusion.shared_buffer.trial import OwnNumbers, observed


class Stage(NamedTuple):
    """Dual path blocks in a row, of which only the first may have a projection."""

    blocks: tuple[Any, ...]
    layers: list[Layer]
    parameters: list[Tensor]  # of all blocks, each once
    fingerprint: Fingerprint
    sources: Sources


def plan_stage(blocks: Sequence[nn.Module]) -> Stage:
    """Reads blocks in a row; raises NotFusible where their modules cannot run twice."""
    fingerprint = Fingerprint(tuple(blocks), [])
    layers = [read_shared_dual_path(block) for block in blocks]
    return Stage(tuple(blocks), layers, distinct_parameters(layers), fingerprint, read_sources(blocks))


def read_shared_dual_path(block: nn.Module) -> Layer:
    """Reads a block whose sub-modules may compute anything."""
    check_no_global_hooks()
    layer = read_layer(block, End(), is_called=False)
    without_numbers = runs_without_numbers() and state_of(block).shared_outcome is None
    if without_numbers or not all(place.tensor.is_leaf for place in layer.parameters):  # a trial would tell nothing
        raise NotFusible(OF_A_GRAPH)
    return layer._replace(end=tried(block, _try_out, "shared_outcome").ends[0])


def is_head(block: nn.Module) -> bool:
    return _projection(block) is not None


def check_stages(stages: Sequence[Stage]) -> None:
    """Raises NotFusible where the backward pass could not tell whether modules have changed."""
    if not all(stage.fingerprint.is_kept for stage in stages) and not runs_without_numbers():
        raise NotFusible(OF_A_GRAPH)


def run_stage(stage: Stage, input: Tensor) -> Tensor:
    """The output ``[r; d]`` of a stage, to which gradients flow through one autograd function."""
    owners = Owners(stage.blocks, stage.fingerprint if stage.fingerprint.is_kept else None, stage.sources)
    return SharedBuffer.apply(_StageRun(stage.layers, stage.parameters, owners, True), input, *stage.parameters)


def plain_paths(block: Any, x: Tensor, split: int | None) -> Tensor:
    """What the plain block makes, both paths in one tensor; ``split`` as :func:`split_of` tells."""
    parts = split is not None and not is_head(block)
    out = run_plain(block, (x[:, :split], x[:, split:]) if parts else x)  # type: ignore[arg-type]
    return torch.cat(out, 1) if isinstance(out, tuple) else out


class _Made(NamedTuple):
    """What a block makes: its projection, if it has one, and ``z`` in one or two tensors."""

    start: Tensor | None
    z: tuple[Tensor, ...]


def _projection(block: nn.Module) -> Any:
    found = (child(block, name) for name in ("c1x1_w_s1", "c1x1_w_s2"))
    return next((module for module in found if module is not None), None)


def _make(block: Any, x: Tensor) -> _Made:
    """The part of a plain block that computes."""
    projection = _projection(block)
    start = None if projection is None else projection(x)
    if child(block, "stochastic_depth") is not None:
        like = x if start is None else start
        zeros = like.new_zeros(like.shape[0], block.num_1x1_c + block.growth_rate, *like.shape[2:])
        return _Made(start, (block.stochastic_depth(block.branch, x, zeros),))
    z = block.c1x1_c(block.c3x3_b(block.c1x1_a(x)))
    if child(block, "c1x1_c1") is None:
        return _Made(start, (z,))
    return _Made(start, (block.c1x1_c1(z), block.c1x1_c2(z)))


class _StageRun(Run):
    def _go(self, input: Tensor) -> list[Tensor]:
        x, residuals = input, []
        for layer in self.layers:
            block: Any = layer.module
            r = block.num_1x1_c
            start, z = self.first(layer, Read.of(x), [x], lambda: _make(block, x))  # noqa: B023
            start = x if start is None else start
            of_residual, new = z if len(z) == 2 else (z[0][:, :r], z[0][:, r:])
            residuals.append(start[:, :r] + of_residual)
            x = torch.cat([residuals[-1], start[:, r:], new], 1)
        return [x, input, *residuals[:-1]]

    def _go_back(self, saved: Sequence[Tensor], grad: Tensor, reruns: Reruns) -> Tensor | None:
        grad = grad.clone()
        for at in reversed(range(len(self.layers))):
            if not reruns.reads_gradient[at + 1]:
                return None
            got = self._block_back(at, saved, grad, reruns)
            if is_head(self.layers[at].module):
                return got
            if got is not None:
                grad.narrow(1, 0, got.shape[1]).add_(got)
        return grad.narrow(1, 0, self.calls[0].read.channels)

    def _block_back(self, at: int, saved: Sequence[Tensor], grad: Tensor, reruns: Reruns) -> Tensor | None:
        """The gradient of what a block reads, through its projection and ``z`` alone.

        Args:
            saved: the buffer of both paths, the stage's input, the residual path in front of each later block.
            grad: gradient of the buffer.
        """
        buffer, input, *residuals = saved
        block: Any = self.layers[at].module
        read, r = self.calls[at].read, int(block.num_1x1_c)

        def make() -> Tensor:
            if at == 0:
                return input.narrow(1, 0, read.channels)  # a view, which cannot be changed in place
            x = read.empty(buffer)
            x.narrow(1, 0, r).copy_(residuals[at - 1])
            dense = read.channels - r
            x.narrow(1, r, dense).copy_(buffer.narrow(1, r, dense))
            return x

        def run(x: Tensor) -> tuple[Tensor, ...]:
            made = _make(block, x)
            return made.z if made.start is None else (made.start, *made.z)

        def gradients(made: tuple[Tensor, ...], is_cut: bool) -> list[Tensor]:
            of_start = [grad.narrow(1, 0, made[0].shape[1])] if is_head(block) else []
            z, before = made[len(of_start) :], made[0].shape[1] if of_start else read.channels
            parts = [grad.narrow(1, 0, r), grad.narrow(1, before, sum(part.shape[1] for part in z) - r)]
            return of_start + ([part.clone() for part in parts] if len(z) == 2 else [torch.cat(parts, 1)])

        return reruns.backward(at, make, run, gradients)


def _try_out(module: nn.Module) -> Form:
    """Compares output, gradients and statistics of a block with those of what is in it, run twice."""
    with isolated():
        conv = first_convolution(inner for inner in [child(module, "c1x1_a")] if inner is not None)
        twin = double_copy(module)
        x = random_input(conv, conv.in_channels)
        form, trial, made = observed(twin, lambda x: plain_paths(twin, x, split_of(twin)), x, lambda: _observe(twin, x))
        if trial.agrees(lambda x: _run_twin(twin, form, x), made):
            return form
    raise NotFusible("its results differ from those of a dual path block")


def _observe(twin: nn.Module, x: Tensor) -> Form:
    with torch.no_grad(), OwnNumbers(), Watch(None) as watch:
        start, z = _make(twin, x)
    return Form(ends=(watch.end(*(z if start is None else (start, *z))),))


def _run_twin(twin: nn.Module, form: Form, x: Tensor) -> Tensor:
    layer = read_layer(twin, form.ends[0], is_called=False)
    parameters = distinct_parameters([layer])
    return SharedBuffer.apply(_StageRun([layer], parameters, Owners(), False), x, *parameters)

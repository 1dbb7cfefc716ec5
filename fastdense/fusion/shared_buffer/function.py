# SPDX-License-Identifier: Apache-2.0
"""Runs the layers of a dense block on one buffer: forward as plain modules, backward once more on what it holds.

    buffer [N, C0 + k_1 + ... + k_L, spatial]   layer l reads the first c_l channels and writes the k_l behind them

The buffer is the output, and all that is saved. The backward pass has one gradient of its size. From the last layer to
the first, the layer's modules run with gradients on a copy of its input, and what they give is added to the gradient of
these channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdense.fusion.shared_buffer.layers import Block, Form
from fastdense.fusion.shared_buffer.reruns import Owners, Read, Reruns, Run, SharedBuffer


def run_layers(block: Block, input: Tensor, owners: Owners, *, redraws: bool = True) -> Tensor:
    """The output of a block, to which gradients flow through one autograd function; see :class:`Run`."""
    return SharedBuffer.apply(_DenseRun(block, owners, redraws), input, *block.parameters)


class _DenseRun(Run):
    def __init__(self, block: Block, owners: Owners, redraws: bool) -> None:
        super().__init__(block.layers, block.parameters, owners, redraws)
        self.form = block.form
        self.in_channels = 0

    def _go(self, input: Tensor) -> list[Tensor]:
        form, features = self.form, [input]
        dtype, channels = input.dtype, input.shape[1]
        self.in_channels = channels
        for layer in self.layers:
            arguments = form.arguments(features)
            read = Read.of(arguments[0]) if form.takes == "tensor" else Read(channels, dtype)
            out = self.first(layer, read, features, lambda: layer.module(*arguments))  # noqa: B023
            features = form.with_new(features, out)
            channels = out.shape[1] if form.joins else channels + out.shape[1]
            dtype = torch.promote_types(dtype, out.dtype)
        return [form.joined(features)]

    def _go_back(self, saved: Sequence[Tensor], grad: Tensor, reruns: Reruns) -> Tensor | None:
        grad = grad.clone()
        for at in reversed(range(len(self.layers))):
            if reruns.reads_gradient[at + 1]:
                grad = self._layer_back(at, saved[0], grad, reruns)
            elif self.form.joins:
                break
        return _part(grad, self.in_channels, self.form)

    def _layer_back(self, at: int, buffer: Tensor, grad: Tensor, reruns: Reruns) -> Tensor:
        """The gradient of the channels that a layer reads.

        Args:
            buffer: all features.
            grad: gradient of the buffer's first channels, or of what the layer returned; may be written to.
        """
        form, read, module = self.form, self.calls[at].read, self.layers[at].module
        prefix = _part(buffer, read.channels, form).detach()
        joins = form.joins

        def make() -> Tensor:
            if form.takes == "tensor":
                return read.empty(prefix).copy_(prefix)
            return prefix.to(read.dtype).narrow(1, 0, read.channels)

        def gradients(made: tuple[Tensor, ...], is_cut: bool) -> list[Tensor]:
            nonlocal joins
            joins, new = form.joins and not is_cut, made[0].shape[1]
            return [_part(grad, new, form) if joins else _new_part(grad, read.channels, new, form).clone()]

        def run(x: Tensor) -> tuple[Tensor, ...]:
            return (module([x] if form.takes == "list" else x),)

        got = reruns.backward(at, make, run, gradients)
        if joins:
            return torch.zeros_like(prefix) if got is None else got.to(buffer.dtype)
        if got is not None:
            _part(grad, read.channels, form).add_(got)
        return _part(grad, read.channels, form) if form.joins else grad


def _part(x: Tensor, channels: int, form: Form) -> Tensor:
    """The channels that a layer reads: those written before it."""
    return x.narrow(1, x.shape[1] - channels if form.prepends else 0, channels)


def _new_part(x: Tensor, channels: int, new: int, form: Form) -> Tensor:
    """The ``new`` channels behind, or in front of, the ``channels`` that a layer reads."""
    return x.narrow(1, x.shape[1] - channels - new if form.prepends else channels, new)

# SPDX-License-Identifier: Apache-2.0
"""Runs layers on one buffer: forward as the plain modules do, backward once more on what the buffer holds.

    buffer [N, C0 + k_1 + ... + k_L, spatial]   layer l reads the first c_l channels and writes the k_l behind them

The buffer is the output, and all that is saved. The backward pass has one gradient of its size. From the last layer to
the first, the layer's modules run with gradients on a copy of its input, and what they give is added to the gradient of
these channels. Parameters are inputs of the one function; a second run reads aliases of them, so that nobody's hooks
see it. Buffers, such as running statistics, are copies there, modes and random numbers those of the first run.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastdense._C import Fingerprint
from fastdense.fusion.equivalence import leaves_of
from fastdense.fusion.shared_buffer.layers import Block, Form, Layer
from fastdense.fusion.shared_buffer.shortcuts import End, Shortcut

_CHANGED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: "
    "fastdense runs the layers of a dense block again in the backward pass, and {} has changed since the forward pass"
)


def run_layers(
    block: Block, input: Tensor, fingerprint: Fingerprint | None, owner: nn.Module | None, *, redraws: bool = True
) -> Tensor:
    """The output of a block, to which gradients flow through one autograd function.

    Args:
        fingerprint: of ``owner``, whose modules are to be in the backward pass what they are now.
        redraws: whether random numbers are drawn again in the backward pass, from torch's generators as they were.
    """
    return _SharedBuffer.apply(_Run(block, fingerprint, owner, redraws), input, *block.parameters)


def needs_gradient(block: Block, input: Tensor) -> bool:
    return torch.is_grad_enabled() and (input.requires_grad or any(p.requires_grad for p in block.parameters))


class _SharedBuffer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: "_Run", input: Tensor, *parameters: Tensor) -> Tensor:
        out = run.forward(input)
        ctx.run = run
        ctx.save_for_backward(out)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        return (None, *ctx.run.backward(out, grad, ctx.needs_input_grad[1:]))


class _Call(NamedTuple):
    """What a layer's first run began with, so that the second begins alike."""

    channels: int  # that it read
    dtype: torch.dtype
    innermost: bool  # whether channels were innermost in memory
    is_cast: bool  # under autocast
    buffers: list[Tensor]  # copies of the layer's buffers
    random: "list[tuple[torch.device, Tensor]]"  # states of generators; none if it drew nothing


class _Run:
    """One forward pass, and all that its backward pass needs besides the buffer."""

    def __init__(self, block: Block, fingerprint: Fingerprint | None, owner: nn.Module | None, redraws: bool) -> None:
        self.block, self.fingerprint, self.owner = block, fingerprint, owner
        self.redraws = redraws and not runs_without_numbers()
        modules = [module for layer in block.layers for module in layer.inner] if owner is None else owner.modules()
        self.training = [(module, module.training) for module in modules]
        self.versions = [p._version for p in block.parameters]
        self.calls: list[_Call] = []
        self.autocast: list[tuple[str, bool, torch.dtype]] = []
        self.in_channels = 0
        self.dtype = torch.float32

    def forward(self, input: Tensor) -> Tensor:
        form = self.block.form
        self.in_channels, self.dtype = input.shape[1], input.dtype
        self.autocast = _autocast_of(input.device)
        features, versions = [input], [input._version]
        dtype, channels = input.dtype, input.shape[1]
        random = self._random_states(input.device)
        is_cast = any(enabled for _, enabled, _ in self.autocast)
        with _autocast_as(self.autocast):
            for layer in self.block.layers:
                buffers = [place.tensor.clone() for place in layer.buffers]
                arguments = form.arguments(features)
                innermost = form.takes == "tensor" and _has_innermost_channels(arguments[0])
                out = layer.module(*arguments)
                after = self._random_states(input.device)
                drawn = random if _differ(random, after) else []
                self.calls.append(_Call(channels, dtype, innermost, is_cast, buffers, drawn))
                random = after
                if [feature._version for feature in features] != versions:
                    raise RuntimeError(f"fastdense: {type(layer.module).__name__} changes its input in place")
                features = form.with_new(features, out)
                versions = [feature._version for feature in features]
                channels = out.shape[1] if form.joins else channels + out.shape[1]
                dtype = torch.promote_types(dtype, out.dtype)
            return form.joined(features)

    def _random_states(self, device: torch.device) -> list[tuple[torch.device, Tensor]]:
        return _random_states(device) if self.redraws else []

    def backward(self, out: Tensor, grad: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of all parameters, where ``needs`` says so."""
        if [p._version for p in self.block.parameters] != self.versions:
            raise RuntimeError(_CHANGED.format("a parameter"))
        form, parameters = self.block.form, self.block.parameters
        wanted = {id(p) for p, needed in zip(parameters, needs[1:], strict=True) if needed}
        grads: dict[int, Tensor] = {}
        reads_gradient = [needs[0]]  # whether the layer's input has a gradient
        for layer in self.block.layers:
            own = any(id(place.tensor) in wanted for place in layer.parameters)
            reads_gradient.append(reads_gradient[-1] or own)
        grad = grad.clone()
        with _modes_as(self.training), _autocast_as(self.autocast):
            if self.fingerprint is not None and not self.fingerprint.holds((self.owner,)):
                raise RuntimeError(_CHANGED.format(f"a {type(self.owner).__name__}"))
            for at in reversed(range(len(self.block.layers))):
                if reads_gradient[at + 1]:
                    rerun = _Rerun(self.block.layers[at], self.calls[at], form, wanted)
                    grad = rerun.backward(out, grad, reads_gradient[at])
                    rerun.add_to(grads)
                elif form.joins:
                    break
        of_input = _part(grad, self.in_channels, form).to(self.dtype) if needs[0] else None
        return of_input, *(grads.get(id(p)) for p in parameters)


def _part(x: Tensor, channels: int, form: Form) -> Tensor:
    """The channels that a layer reads: those written before it."""
    return x.narrow(1, x.shape[1] - channels if form.prepends else 0, channels)


def _new_part(x: Tensor, channels: int, new: int, form: Form) -> Tensor:
    """The ``new`` channels behind, or in front of, the ``channels`` that a layer reads."""
    return x.narrow(1, x.shape[1] - channels - new if form.prepends else channels, new)


class _Prefix(torch.autograd.Function):
    """What a layer reads, as no leaf: its code may change it in place. The gradient goes to a list."""

    @staticmethod
    def forward(ctx: Any, trigger: Tensor, prefix: Tensor, call: _Call, is_copied: bool, sink: list[Tensor]) -> Tensor:
        ctx.sink = sink
        return _copied(prefix, call) if is_copied else prefix.to(call.dtype).view(prefix.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.sink.append(grad)
        return (None,) * 5


def _copied(prefix: Tensor, call: _Call) -> Tensor:
    """A copy with the strides that the layer's input had."""
    if call.innermost:
        return prefix.movedim(1, -1).to(call.dtype, copy=True, memory_format=torch.contiguous_format).movedim(-1, 1)
    return prefix.to(call.dtype, copy=True, memory_format=torch.contiguous_format)


class _Rerun:
    """The second run of one layer."""

    def __init__(self, layer: Layer, call: _Call, form: Form, wanted: set[int]) -> None:
        self.layer, self.call, self.form = layer, call, form
        self.aliases: dict[int, Tensor] = {}
        for place in layer.parameters:
            if id(place.tensor) in wanted:
                self.aliases[id(place.tensor)] = nn.Parameter(place.tensor.detach())

    def backward(self, buffer: Tensor, grad: Tensor, reads_gradient: bool) -> Tensor:
        """The gradient of the channels that the layer reads, beside those of the layer's parameters in the aliases.

        Args:
            buffer: all features.
            grad: gradient of the buffer's first channels, or of what the layer returned; may be written to.
        """
        form, call = self.form, self.call
        sink: list[Tensor] = []
        trigger = torch.empty(0, requires_grad=reads_gradient)
        with torch.enable_grad(), self._as_in_the_first_run(buffer.device):
            prefix = _part(buffer, call.channels, form).detach()
            x = _Prefix.apply(trigger, prefix, call, form.takes == "tensor", sink)
            with Shortcut(End() if call.is_cast else self.layer.end, x) as shortcut:
                out = self.layer.module([x] if form.takes == "list" else x)
            if shortcut.new is not None and out is not shortcut.new:
                raise RuntimeError(
                    f"fastdense: {type(self.layer.module).__name__} does something else than when it was converted"
                )
            joins = form.joins and not shortcut.joined
            if joins:
                grad_out = _part(grad, out.shape[1], form)
            else:
                grad_out = _new_part(grad, call.channels, out.shape[1], form).clone()
            if out.requires_grad:
                self._check_leaves(out, trigger)
                torch.autograd.backward(out, grad_out.to(out.dtype))
        got = sum(sink[1:], sink[0]) if sink else None
        if joins:
            return torch.zeros_like(prefix) if got is None else got.to(buffer.dtype)
        if got is not None:
            _part(grad, call.channels, form).add_(got)
        return _part(grad, call.channels, form) if form.joins else grad

    def add_to(self, grads: dict[int, Tensor]) -> None:
        """Adds the gradients of the layer's parameters to those of all."""
        for key, alias in self.aliases.items():
            if alias.grad is not None:
                grads[key] = alias.grad if key not in grads else grads[key] + alias.grad

    @contextlib.contextmanager
    def _as_in_the_first_run(self, device: torch.device) -> Iterator[None]:
        """Puts aliases and copies in the places of parameters and buffers, and sets the generators."""
        layer = self.layer
        swapped = [*layer.parameters, *layer.buffers, *layer.recounted]
        now = [(place, place.owner[place.name]) for place in swapped]
        before = _random_states(device) if self.call.random else []
        copies = {id(place.tensor): copy.clone() for place, copy in zip(layer.buffers, self.call.buffers, strict=True)}
        copies |= {id(place.tensor): place.tensor.clone() for place in layer.recounted}
        try:
            for place in swapped:
                key = id(place.tensor)
                found = self.aliases.get(key, copies.get(key))
                place.owner[place.name] = place.tensor.detach() if found is None else found
            _set_random_states(self.call.random)
            yield
        finally:
            for place, tensor in now:
                place.owner[place.name] = tensor
            _set_random_states(before)

    def _check_leaves(self, out: Tensor, trigger: Tensor) -> None:
        """Raises where a gradient would go to a tensor that is no parameter, and so be lost."""
        known = {id(trigger), *map(id, self.aliases.values())}
        if any(id(leaf) not in known for leaf in leaves_of(out)):
            raise RuntimeError(
                f"fastdense: {type(self.layer.module).__name__} reads a tensor that requires grad and is none of its "
                "parameters; its gradient would be lost: register it, or call fastdense.restore(model)"
            )


def _has_innermost_channels(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


@contextlib.contextmanager
def _modes_as(training: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Within it, modules are in training or in eval mode as listed."""
    changed = [(module, module.training) for module, mode in training if module.training != mode]
    try:
        for module, mode in training:
            if module.training != mode:
                module.training = mode
        yield
    finally:
        for module, mode in changed:
            module.training = mode


def _autocast_of(device: torch.device) -> list[tuple[str, bool, torch.dtype]]:
    kinds = dict.fromkeys(["cpu", device.type] if device.type != "meta" else ["cpu"])
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


@contextlib.contextmanager
def _autocast_as(states: list[tuple[str, bool, torch.dtype]]) -> Iterator[None]:
    """Autocast as listed. Without its cache: that would keep weights cast without a graph for those who want one."""
    with contextlib.ExitStack() as stack:
        for kind, enabled, dtype in states:
            if enabled or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        yield


def _random_states(device: torch.device) -> list[tuple[torch.device, Tensor]]:
    states = [(torch.device("cpu"), torch.get_rng_state())]
    if device.type == "cuda":
        states.append((device, torch.cuda.get_rng_state(device)))
    return states


def _set_random_states(states: list[tuple[torch.device, Tensor]]) -> None:
    for device, state in states:
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


def _differ(before: list[tuple[torch.device, Tensor]], after: list[tuple[torch.device, Tensor]]) -> bool:
    return any(not torch.equal(a, b) for (_, a), (_, b) in zip(before, after, strict=True))


def runs_without_numbers() -> bool:
    """Whether fake tensors stand for all others, as where saved bytes are counted."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None

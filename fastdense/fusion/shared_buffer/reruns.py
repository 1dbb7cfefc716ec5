# SPDX-License-Identifier: Apache-2.0
"""Runs layers twice: as plain modules in the forward pass, and once more in the backward pass, beginning alike.

Parameters are inputs of the one autograd function; a second run reads aliases of them, so that nobody's hooks see it.
Buffers, such as running statistics, are copies there, modes and random numbers those of the first run.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastdense._C import Fingerprint
from fastdense.fusion.equivalence import leaves_of
from fastdense.fusion.plan.code import Sources
from fastdense.fusion.plan.kept import IN_TURN
from fastdense.fusion.shared_buffer.layers import Layer
from fastdense.fusion.shared_buffer.shortcuts import End, Shortcut
from fastdense.ops.autograd import refuse_double_backward
from fastdense.ops.batching import level_of_gradients

_CHANGED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: "
    "fastdense runs the layers of a block again in the backward pass, and {} has changed since the forward pass"
)

# Why modules cannot be watched for changes between the passes.
OF_A_GRAPH = "its parameters belong to a graph or to a transform"


class Owners(NamedTuple):
    """The modules that layers belong to, which are to be in the backward pass what they are now.

    Args:
        modules: none where the layers are of a trial.
        fingerprint: of the modules; None where nothing has numbers, and so nobody will ask for them.
        sources: the code of the modules, and what it reads.
    """

    modules: tuple[nn.Module, ...] = ()
    fingerprint: Fingerprint | None = None
    sources: Sources | None = None


class Read(NamedTuple):
    """What a layer's input was like: all channels that it read, and whether channels were innermost in memory."""

    channels: int
    dtype: torch.dtype
    innermost: bool = False

    @staticmethod
    def of(x: Tensor) -> "Read":
        return Read(x.shape[1], x.dtype, not x.is_contiguous() and x.movedim(1, -1).is_contiguous())

    def empty(self, like: Tensor) -> Tensor:
        """Memory for such an input: ``like`` has its sizes but for the channels, and its device."""
        sizes = [like.shape[0], *like.shape[2:]]
        if self.innermost:
            return like.new_empty([*sizes, self.channels], dtype=self.dtype).movedim(-1, 1)
        return like.new_empty([sizes[0], self.channels, *sizes[1:]], dtype=self.dtype)


class Call(NamedTuple):
    """What a layer's first run began with, so that the second begins alike."""

    read: Read
    is_cast: bool  # under autocast
    buffers: list[Tensor]  # copies of the layer's buffers
    random: "list[tuple[torch.device, Tensor]]"  # states of generators; none if it drew nothing


class Run:
    """One forward pass, and all that its backward pass needs besides what autograd saves.

    Args:
        layers: in order.
        parameters: of all layers, each once.
        owners: of the layers.
        redraws: whether random numbers are drawn again in the backward pass, from torch's generators as they were.
    """

    def __init__(self, layers: list[Layer], parameters: list[Tensor], owners: Owners, redraws: bool) -> None:
        self.layers, self.parameters, self.owners = layers, parameters, owners
        self.redraws = redraws and not runs_without_numbers()
        modules = [inner for module in owners.modules for inner in module.modules()]
        modules = modules or [module for layer in layers for module in layer.inner]
        self.training = [(module, module.training) for module in modules]
        self.versions = [p._version for p in parameters]
        self.calls: list[Call] = []
        self.autocast: list[tuple[str, bool, torch.dtype]] = []
        self.random: list[tuple[torch.device, Tensor]] = []  # the generators in front of the next layer
        self.device = torch.device("cpu")
        self.dtype = torch.float32

    def forward(self, input: Tensor) -> list[Tensor]:
        """The output, and behind it what else is saved for the backward pass."""
        self.device, self.dtype = input.device, input.dtype
        self.autocast = _autocast_of(input.device)
        self.random = self._random_states()
        with _autocast_as(self.autocast):
            return self._go(input)

    def _go(self, input: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def first(self, layer: Layer, read: Read, features: Sequence[Tensor], run: Callable[[], Any]) -> Any:
        """The first run of a layer, which must not change ``features``."""
        buffers = [place.tensor.clone() for place in layer.buffers]
        versions = [feature._version for feature in features]
        is_cast = any(enabled for _, enabled, _ in self.autocast)
        out = run()
        before, self.random = self.random, self._random_states()
        self.calls.append(Call(read, is_cast, buffers, before if _differ(before, self.random) else []))
        if [feature._version for feature in features] != versions:
            raise RuntimeError(f"fastdense: {type(layer.module).__name__} changes its input in place")
        return out

    def _random_states(self) -> list[tuple[torch.device, Tensor]]:
        return _random_states(dict.fromkeys([torch.device("cpu"), self.device])) if self.redraws else []

    def backward(self, saved: Sequence[Tensor], grad: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of all parameters, where ``needs`` says so."""
        if [p._version for p in self.parameters] != self.versions:
            raise RuntimeError(_CHANGED.format("a parameter"))
        wanted = {id(p) for p, needed in zip(self.parameters, needs[1:], strict=True) if needed}
        grads: dict[int, Tensor] = {}
        reads_gradient = [needs[0]]  # whether the layer's input has a gradient
        for layer in self.layers:
            own = any(id(place.tensor) in wanted for place in layer.parameters)
            reads_gradient.append(reads_gradient[-1] or own)
        with _modes_as(self.training), _autocast_as(self.autocast):
            self._check_owners()
            of_input = self._go_back(saved, grad, Reruns(self.layers, self.calls, wanted, reads_gradient, grads))
        of_input = of_input.to(self.dtype) if needs[0] and of_input is not None else None
        return of_input, *(grads.get(id(p)) for p in self.parameters)

    def _check_owners(self) -> None:
        fingerprint, modules = self.owners.fingerprint, self.owners.modules
        if fingerprint is not None and not fingerprint.holds(modules):
            raise RuntimeError(_CHANGED.format(f"a {type(modules[0]).__name__}"))
        if self.owners.sources is not None and not self.owners.sources.still_holds():
            raise RuntimeError(_CHANGED.format(f"a variable that the code of a {type(modules[0]).__name__} reads"))

    def _go_back(self, saved: Sequence[Tensor], grad: Tensor, reruns: "Reruns") -> Tensor | None:
        raise NotImplementedError


def needs_gradient(input: Tensor, parameters: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and (input.requires_grad or any(p.requires_grad for p in parameters))


class SharedBuffer(torch.autograd.Function):
    """The one autograd function of a run: ``SharedBuffer.apply(run, input, *run.parameters)``."""

    @staticmethod
    def forward(ctx: Any, run: Run, input: Tensor, *parameters: Tensor) -> Tensor:
        saved = run.forward(input)
        ctx.run = run
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return saved[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        if level_of_gradients() > 0:
            raise RuntimeError(
                "fastdense: a block on a shared buffer takes no batch of gradients (is_grads_batched, vectorize=True); "
                "call fastdense.restore(model) for plain modules"
            )
        with torch.no_grad(), IN_TURN:
            grads = ctx.run.backward(saved, grad, ctx.needs_input_grad[1:])
        return (None, *refuse_double_backward("a block on a shared buffer", grads, [grad, *saved]))


class _Prefix(torch.autograd.Function):
    """What a layer reads, as no leaf: its code may change it in place. The gradient goes to a list."""

    @staticmethod
    def forward(ctx: Any, trigger: Tensor, make: Callable[[], Tensor], sink: list[Tensor]) -> Tensor:
        ctx.sink = sink
        return make()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.sink.append(grad)
        return (None,) * 3


class Reruns(NamedTuple):
    """The second runs of all layers."""

    layers: list[Layer]
    calls: list[Call]
    wanted: set[int]  # parameters that need a gradient
    reads_gradient: list[bool]  # whether a layer's input has a gradient; at last, whether the output has one
    grads: dict[int, Tensor]  # of parameters, so far

    def backward(
        self,
        at: int,
        make: Callable[[], Tensor],
        run: Callable[[Tensor], tuple[Tensor, ...]],
        gradients: Callable[[tuple[Tensor, ...], bool], Sequence[Tensor]],
    ) -> Tensor | None:
        """The gradient of what the layer ``at`` reads; None if none gets there. Those of its parameters are added.

        Args:
            make: what the layer reads: a tensor of its own where its code may change it in place.
            run: the layer.
            gradients: of what ``run`` gives, and of whether the join with the input has been cut off from that.
        """
        rerun = _Rerun(self.layers[at], self.calls[at], self.wanted)
        got = rerun.backward(make, run, gradients, self.reads_gradient[at])
        for key, alias in rerun.aliases.items():
            if alias.grad is not None:
                self.grads[key] = alias.grad if key not in self.grads else self.grads[key] + alias.grad
        return got


class _Rerun:
    """The second run of one layer."""

    def __init__(self, layer: Layer, call: Call, wanted: set[int]) -> None:
        self.layer, self.call = layer, call
        self.aliases: dict[int, Tensor] = {}
        for place in layer.parameters:
            if id(place.tensor) in wanted:
                self.aliases[id(place.tensor)] = nn.Parameter(place.tensor.detach())

    def backward(self, make: Any, run: Any, gradients: Any, reads_gradient: bool) -> Tensor | None:
        """See :meth:`Reruns.backward`; gradients of parameters are left in the aliases."""
        sink: list[Tensor] = []
        trigger = torch.empty(0, requires_grad=reads_gradient)
        with torch.enable_grad(), self._as_in_the_first_run():
            x = _Prefix.apply(trigger, make, sink)
            with Shortcut(End() if self.call.is_cast else self.layer.end, x) as shortcut:
                made = run(x)
            if any(all(new is not out for out in made) for new in shortcut.new):
                raise RuntimeError(
                    f"fastdense: {type(self.layer.module).__name__} does something else than when it was converted"
                )
            pairs = zip(made, gradients(made, shortcut.joined), strict=True)
            found = [(out, grad.to(out.dtype)) for out, grad in pairs if out.requires_grad]
            if found:
                self._check_leaves([out for out, _ in found], trigger)
                torch.autograd.backward([out for out, _ in found], [grad for _, grad in found])
        return sum(sink[1:], sink[0]) if sink else None

    @contextlib.contextmanager
    def _as_in_the_first_run(self) -> Iterator[None]:
        """Puts aliases and copies in the places of parameters and buffers, and sets the generators."""
        layer = self.layer
        swapped = [*layer.parameters, *layer.buffers, *layer.recounted]
        now = [(place, place.owner[place.name]) for place in swapped]
        before = _random_states(device for device, _ in self.call.random)
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

    def _check_leaves(self, outs: list[Tensor], trigger: Tensor) -> None:
        """Raises where a gradient would go to a tensor that is no parameter, and so be lost."""
        known = {id(trigger), *map(id, self.aliases.values())}
        if any(id(leaf) not in known for leaf in leaves_of(*outs)):
            raise RuntimeError(
                f"fastdense: {type(self.layer.module).__name__} reads a tensor that requires grad and is none of its "
                "parameters; its gradient would be lost: register it, or call fastdense.restore(model)"
            )


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


def _random_states(devices: Iterable[torch.device]) -> list[tuple[torch.device, Tensor]]:
    """Of the generators of those devices that have one."""
    states = {"cpu": lambda _: torch.get_rng_state(), "cuda": torch.cuda.get_rng_state}
    return [(device, states[device.type](device)) for device in devices if device.type in states]


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

# SPDX-License-Identifier: Apache-2.0
"""The equivalence check: runs a copy of a module of unknown code on random numbers to see what it computes."""

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdense.fusion.base import run_plain
from fastdense.fusion.checks import CONVS, NORMS, SAMPLE_NORMS, NotFusible
from fastdense.fusion.plan.code import Sources
from fastdense.fusion.plan.kept import read_sources
from fastdense.fusion.plan.state import STATE, state_of

Outcome = TypeVar("Outcome")


# Attributes of every module, and the one that conversion itself sets.
_NOT_OF_CODE = frozenset([*nn.Module().__dict__, STATE])


_VALUES = (int, float, str, type(None), type, types.FunctionType, types.BuiltinFunctionType)


# The check takes about 30 bytes for each number: no more than 1 GB.
_MOST_NUMBERS = 2**25


class Code(NamedTuple):
    """What decides what the code of a module does: classes; numbers, words, functions and plain tensors by place."""

    classes: list[type]
    attributes: dict[tuple[int, str], Any]

    def still_holds(self, now: "Code") -> bool:
        """Attributes that came later do not matter to code that ran without them; FSDP adds some."""
        return self.classes == now.classes and all(
            place in now.attributes and now.attributes[place] == value for place, value in self.attributes.items()
        )


def code_of(module: nn.Module) -> Code:
    """Norms and convolutions are left out: they are read at each call. So is the class of the module itself."""
    code = Code([], {})
    for at, inner in enumerate(module.modules()):
        if isinstance(inner, CONVS + NORMS + SAMPLE_NORMS):
            continue
        if inner is not module:
            code.classes.append(type(inner))
        for name, value in inner.__dict__.items():
            if name not in _NOT_OF_CODE:
                _note(code.attributes, at, name, value, depth=2)
    return code


def _note(attributes: dict[tuple[int, str], Any], at: int, name: str, value: Any, depth: int) -> None:
    if isinstance(value, Tensor):
        attributes[at, name] = (id(value), None if value.is_inference() else value._version)
    elif isinstance(value, _VALUES):
        attributes[at, name] = value
    elif isinstance(value, list | tuple) and all(isinstance(item, _VALUES) for item in value):
        attributes[at, name] = tuple(value)
    elif depth > 0:  # what a dict or an object holds, as configurations are
        is_dict = isinstance(value, dict)  # of which the compiler does not read the module
        items = value if is_dict else getattr(value, "__dict__", {})
        if is_dict or not (isinstance(value, nn.Module) or type(value).__module__.partition(".")[0] == "torch"):
            for key, item in items.items():
                _note(attributes, at, f"{name}.{key}", item, depth - 1)


def tried(module: nn.Module, attempt: Callable[[nn.Module], Outcome], place: str = "outcome") -> Outcome:
    """What ``attempt`` finds out, or the reason why nothing: remembered until the module's code may do other things.

    It is remembered in an attribute of the module's state.
    """
    if "forward" in module.__dict__:
        raise NotFusible("its forward was replaced on the instance")
    code, state = code_of(module), state_of(module)
    known = getattr(state, place)
    sources = None if torch.compiler.is_compiling() else read_sources((module,), known and known.sources)
    if known is None or not known.still_holds(code, sources):
        if any(p.is_meta for p in module.parameters()):
            raise NotFusible("its weights are on the meta device; convert after loading them")
        found: Any
        try:
            if sources is not None and sources.draws:
                raise NotFusible("its forward draws random numbers")
            found = attempt(module)
            if sources is not None and not sources.still_holds():
                sources = None
                raise NotFusible("its forward changes what its code reads")
        except NotFusible as reason:
            found = str(reason)
        known = _Known(code, sources, found)
        setattr(state, place, known)
    if isinstance(known.found, str):
        raise NotFusible(known.found)
    return known.found


class _Known(NamedTuple):
    """What a trial has told, and of which code."""

    code: Code
    sources: Sources | None  # None where trials change what they read: another would tell nothing new
    found: Any

    def still_holds(self, code: Code, sources: Sources | None) -> bool:
        is_known = sources is None or self.sources is None or sources is self.sources
        return is_known and self.code.still_holds(code)


def double_copy(module: nn.Module) -> nn.Module:
    """A copy on the CPU, in float64, with random parameters and statistics: zeros would hide what they multiply."""
    if sum(p.numel() for p in module.parameters()) > _MOST_NUMBERS:
        raise NotFusible(f"it has more than {_MOST_NUMBERS} parameters, too many for the equivalence check")
    numbers = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(module).to("cpu", torch.float64)
    dims = next(conv.weight.dim() - 2 for conv in twin.modules() if isinstance(conv, CONVS))
    with torch.no_grad():
        inner: Any
        for inner in twin.modules():
            is_norm = isinstance(inner, NORMS + SAMPLE_NORMS)
            if type(inner) is nn.SyncBatchNorm:
                inner.__class__ = NORMS[dims - 1]  # type: ignore[assignment]
            elif isinstance(inner, nn.SyncBatchNorm):
                raise NotFusible(
                    f"the equivalence check cannot run a {type(inner).__name__}: convert the model before its norms"
                )
            for p in inner.parameters(recurse=False):
                p.requires_grad_()
                p.uniform_(-1, 1, generator=numbers)
                if not is_norm:
                    p.div_((p.numel() / max(p.shape[:1].numel(), 1)) ** 0.5)
            if is_norm and inner.weight is not None:
                inner.weight.abs_().add_(0.5)
            if is_norm and getattr(inner, "running_mean", None) is not None:
                inner.running_mean.uniform_(-1, 1, generator=numbers)
                inner.running_var.uniform_(0.5, 1.5, generator=numbers)
    return twin


def random_input(conv: Any, channels: int) -> Tensor:
    """A small batch ``[2, channels, spatial]`` in as many dimensions as ``conv`` has."""
    sizes = (4, 3, 2)[: conv.weight.dim() - 2]
    return torch.randn(2, channels, *sizes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the plain class, without the hooks of the module itself."""
    return lambda *inputs: run_plain(module, *inputs)


class Step(NamedTuple):
    """What one pass makes: output, gradients, and the statistics after the forward pass.

    ``moves_twice``: the backward pass moves the statistics once more, as it does under a checkpoint.
    """

    tensors: list[Tensor | None]
    moves_twice: bool

    def agrees(self, other: "Step") -> bool:
        """Whether tensors are the same to nine digits of each one's norm."""
        return all(_near(a, b) for a, b in zip(self.tensors, other.tensors, strict=True))

    def is_finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self.tensors if t is not None)


def _near(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape:
        return a is b
    return bool((a.double() - b.double()).norm() <= 1e-9 * b.double().norm())


class Situation(NamedTuple):
    """A mode, and the factor of all parameters and of the input.

    Some functions, such as relu6 and relu, or clamps of features, differ where numbers are large, and only there.
    """

    training: bool
    factor: float = 1.0


# Large numbers in training alone: in eval mode norms do not take them back, and they would grow from layer to layer.
_SITUATIONS = (Situation(True), Situation(False), Situation(True, 2.0**3), Situation(True, 2.0**20))


class Trial(NamedTuple):
    """A copy, what it reads, and what watches each pass."""

    twin: nn.Module
    input: Tensor
    watch: Callable[[], AbstractContextManager[Any]]

    def steps(self, forward: Callable[[Tensor], Any]) -> dict[Situation, Step]:
        """What ``forward`` makes in every situation that keeps its numbers finite."""
        made = {}
        for situation in _SITUATIONS:
            step = self._step(forward, situation)
            if situation.factor == 1 and not self._step(forward, situation).agrees(step):
                raise NotFusible("its results differ from run to run")
            if situation.factor == 1 or step.is_finite():
                made[situation] = step
        return made

    def agrees(self, forward: Callable[[Tensor], Any], made: dict[Situation, Step]) -> bool:
        """Whether ``forward`` makes the same."""
        return all(self._step(forward, situation).agrees(step) for situation, step in made.items())

    def _step(self, forward: Callable[[Tensor], Any], situation: Situation) -> Step:
        """One pass; statistics and parameters are put back."""
        self.twin.train(situation.training)
        with _multiplied(self.twin, situation.factor):
            return _one_step(self.twin, forward, self.input * situation.factor, self.watch())


@contextlib.contextmanager
def _multiplied(module: nn.Module, factor: float) -> Iterator[None]:
    """Within it all parameters are multiplied by a power of two; norms that have no weight get it as their weight."""
    if factor == 1:
        yield
        return
    norms: list[Any] = [inner for inner in module.modules() if isinstance(inner, NORMS + SAMPLE_NORMS)]
    bare = [norm for norm in norms if norm.weight is None]
    parameters = list(module.parameters())
    torch._foreach_mul_([p.data for p in parameters], factor)
    for norm in bare:
        channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
        norm.weight = nn.Parameter(torch.full([channels], factor, dtype=torch.float64))
    try:
        yield
    finally:
        for norm in bare:
            norm.weight = None
        torch._foreach_mul_([p.data for p in parameters], 1 / factor)


def _one_step(
    module: nn.Module, forward: Callable[[Tensor], Any], x: Tensor, watch: AbstractContextManager[Any]
) -> Step:
    """One pass that ``watch`` sees; the statistics are put back."""
    before = [buffer.clone() for buffer in module.buffers()]
    x = x.clone().requires_grad_()
    wanted = [x, *module.parameters()]
    with watch:
        out = forward(x)
        if not isinstance(out, Tensor) or not out.requires_grad:
            raise NotFusible("its output is not one tensor that requires grad")
        if not {id(leaf) for leaf in leaves_of(out)} <= {id(t) for t in wanted}:
            raise NotFusible("it reads a tensor that requires grad and is none of its parameters")
        statistics = [buffer.clone() for buffer in module.buffers()]
        torch.autograd.backward(out, torch.linspace(-1, 1, out.numel()).to(out).view_as(out))
    grads = [t.grad for t in wanted]
    for t in wanted:
        t.grad = None
    moves_twice = any(not torch.equal(*pair) for pair in zip(module.buffers(), statistics, strict=True))
    for buffer, old in zip(module.buffers(), before, strict=True):
        buffer.copy_(old)
    return Step([out.detach(), *grads, *statistics], moves_twice)


def leaves_of(*outs: Tensor) -> Iterator[Tensor]:
    """The leaf tensors that gradients of ``outs`` go to."""
    seen: set[Any] = set()
    stack = [out.grad_fn for out in outs]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of the nodes where gradients end
        if variable is not None:
            yield variable
        stack += [following for following, _ in node.next_functions]


class NoRandomNumbers(TorchDispatchMode):
    """Refuses operators that draw random numbers before they run: generators belong to the caller.

    It sees the operators of its own thread alone.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotFusible("its forward draws random numbers")
        return func(*args, **(kwargs or {}))


class Dropouts(TorchFunctionMode):
    """Puts a known mask in the place of every dropout of single features, and collects their rates."""

    def __init__(self, rates: set[float]) -> None:
        super().__init__()
        self.rates = rates

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.dropout:
            return func(*args, **(kwargs or {}))
        return self._dropout(*args, **(kwargs or {}))

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        self.rates.add(float(p))
        return masked(input)


def masked(x: Tensor) -> Tensor:
    """``x`` times a mask that depends on the shape alone."""
    return x * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape)


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Where foreign code is tried: with gradients and without autocast; whatever it raises makes the reason."""
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
        ):
            yield
    except NotFusible:
        raise
    except Exception as error:
        raise NotFusible(f"it fails when called with one tensor: {error}") from error

# SPDX-License-Identifier: Apache-2.0
"""The equivalence check: runs a copy of a module of unknown code on random numbers to see what it computes."""

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdense.fusion.base import run_plain
from fastdense.fusion.checks import CONVS, NORMS, SAMPLE_NORMS, NotFusible

# The check takes about 30 bytes for each number: no more than 1 GB.
_MOST_NUMBERS = 2**25


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
                    p.div_(_fan(p) ** 0.5)
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
        pairs = zip(self.tensors, other.tensors, strict=True)
        return len(self.tensors) == len(other.tensors) and all(_near(a, b) for a, b in pairs)

    def agrees_where_finite(self, other: "Step") -> bool:
        """Whether ``self`` has the finite numbers of ``other``, and of the last sample's output no more; gradients are
        to be finite where those of ``other`` are.
        """
        if not (self.tensors and other.tensors):
            return self.tensors == other.tensors
        out, wanted = cast(Tensor, self.tensors[0]), cast(Tensor, other.tensors[0])
        finite = wanted.isfinite()
        return (
            out.shape == wanted.shape
            and torch.equal(out[-1].isfinite(), finite[-1])
            and all(_is_finite_with(a, b) for a, b in zip(self.tensors, other.tensors, strict=True))
            and _near(out.where(finite, 0), wanted.where(finite, 0))
        )

    def is_finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self.tensors if t is not None)


def _near(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape:
        return a is b
    return bool((a.double() - b.double()).norm() <= 1e-9 * b.double().norm())


def _is_finite_with(a: Tensor | None, b: Tensor | None) -> bool:
    return a is None or b is None or bool(a.isfinite()[b.isfinite()].all())


class Situation(NamedTuple):
    """A mode, the factor of all parameters and of the input, and what is planted in one sample of the input each.

    Some functions, such as relu6 and relu, or clamps of features, differ where numbers are large, and only there;
    others, such as nan_to_num, at NaN and infinities.
    """

    training: bool
    factor: float = 1.0
    planted: tuple[float, ...] = ()


# Large numbers in training alone: in eval mode norms do not take them back, and they would grow from layer to layer.
# NaN alone in training: norms spread it over the batch, as they would infinities.
_SITUATIONS = (
    Situation(True),
    Situation(False),
    Situation(True, 2.0**3),
    Situation(True, 2.0**20),
    Situation(True, planted=(math.nan,)),
    Situation(False, planted=(math.nan, math.inf, -math.inf)),
)


class Trial(NamedTuple):
    """A copy, what it reads, and what watches each pass.

    ``runs_its_code``: what it is compared with runs the code of its layers, so that every NaN has to be the same.
    """

    twin: nn.Module
    input: Tensor
    watch: Callable[[], AbstractContextManager[Any]]
    runs_its_code: bool = False

    def steps(self, forward: Callable[[Tensor], Any]) -> dict[Situation, Step]:
        """What ``forward`` makes in every situation that keeps its numbers finite."""
        made = {}
        for situation in _SITUATIONS:
            step = self._step(forward, situation)
            is_usual = situation.factor == 1 and not situation.planted
            if is_usual and not self._step(forward, situation).agrees(step):
                raise NotFusible("its results differ from run to run")
            if situation.factor == 1 or step.is_finite():
                made[situation] = step
        if not self.runs_its_code:  # on a shared buffer it runs without gradients as it is
            self._check_inference(forward, made[Situation(False)])
        return made

    def _check_inference(self, forward: Callable[[Tensor], Any], step: Step) -> None:
        """Raises NotFusible where ``forward`` makes something else without gradients than ``step`` did in eval mode."""
        self.twin.eval()
        try:
            with warnings.catch_warnings(), torch.inference_mode(), self.watch():
                warnings.simplefilter("ignore")  # of checkpoints that have nothing to do
                out = forward(self.input.clone())
        except NotFusible:
            raise
        except Exception:
            return
        if not isinstance(out, Tensor) or not _near(out, step.tensors[0]):
            raise NotFusible("its results are others without gradients")

    def agrees(self, forward: Callable[[Tensor], Any], made: dict[Situation, Step]) -> bool:
        """Whether ``forward`` makes the same; raises NotFusible where only NaN or infinities make a difference."""
        for situation, step in made.items():
            again = self._step(forward, situation)
            is_lenient = situation.planted and not self.runs_its_code
            if not (again.agrees_where_finite(step) if is_lenient else again.agrees(step)):
                if situation.planted:
                    raise NotFusible("it treats NaN or infinity in a way of its own")
                return False
        return True

    def _step(self, forward: Callable[[Tensor], Any], situation: Situation) -> Step:
        """One pass; statistics and parameters are put back."""
        self.twin.train(situation.training)
        if situation.planted:
            return self._planted_step(forward, situation)
        with _multiplied(self.twin, situation.factor):
            return _one_step(self.twin, forward, self.input * situation.factor, self.watch(), _gradient)

    def _planted_step(self, forward: Callable[[Tensor], Any], situation: Situation) -> Step:
        """The output where each sample but the last reads one of the values; nothing where the module raises an error.

        In eval mode, also the gradient that the last sample's input gets where its output gets NaN. The others' would
        not tell: the gradient of a ReLU at NaN depends on how the ReLU is written. It tells where the same code runs.
        """
        values = situation.planted
        x = self.input.repeat(len(values) + 1, *[1] * (self.input.dim() - 1))[: len(values) + 1]
        for sample, value in enumerate(values):
            x[sample].view(-1)[sample] = value
        goes_back = self.runs_its_code or not situation.training
        try:
            with _positive(self.twin):
                step = _one_step(self.twin, forward, x, self.watch(), _planted_gradient if goes_back else None)
        except NotFusible:
            raise
        except Exception:
            return Step([], False)
        if self.runs_its_code:
            found = [t for t in step.tensors if t is not None]
            return Step([*(t.nan_to_num(0.0, 0.0, 0.0) for t in found), *(t.isfinite() for t in found)], False)
        out, grad = step.tensors[:2]
        return Step([out] if grad is None else [out, grad[-1]], False)


def _gradient(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel()).to(out).view(out.shape)


def _planted_gradient(out: Tensor) -> Tensor:
    grad = _gradient(out)
    grad[-1].view(-1)[[0, -1]] = math.nan  # new features are in the first or in the last channel
    return grad


@contextlib.contextmanager
def _positive(module: nn.Module) -> Iterator[None]:
    """Within it no parameter is negative: infinities of both signs, which would make NaN, do not meet.

    Each sums up to about the same whatever its size, so that numbers do not grow from layer to layer.
    """
    before = [(p.data, p.data.signbit(), 2.0 ** -round(math.log2(max(_fan(p), 1)) / 2)) for p in module.parameters()]
    for p, _, factor in before:
        p.abs_().mul_(factor)
    try:
        yield
    finally:
        for p, was_negative, factor in before:
            p.div_(factor)
            p.copy_(p.where(~was_negative, -p))


def _fan(p: Tensor) -> float:
    """How many numbers each output of a convolution reads; 1 for a parameter of channels."""
    return p.numel() / max(p.shape[:1].numel(), 1)


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
    module: nn.Module,
    forward: Callable[[Tensor], Any],
    x: Tensor,
    watch: AbstractContextManager[Any],
    gradient_of: Callable[[Tensor], Tensor] | None,
) -> Step:
    """One pass that ``watch`` sees, with no gradients where none is given; the statistics are put back."""
    before = [buffer.clone() for buffer in module.buffers()]
    x = x.clone().requires_grad_()
    wanted = [x, *module.parameters()]
    try:
        with watch:
            out = forward(x)
            if not isinstance(out, Tensor) or not out.requires_grad:
                raise NotFusible("its output is not one tensor that requires grad")
            if not {id(leaf) for leaf in leaves_of(out)} <= {id(t) for t in wanted}:
                raise NotFusible("it reads a tensor that requires grad and is none of its parameters")
            statistics = [buffer.clone() for buffer in module.buffers()]
            if gradient_of is not None:
                torch.autograd.backward(out, gradient_of(out))
        moves_twice = any(not torch.equal(*pair) for pair in zip(module.buffers(), statistics, strict=True))
        return Step([out.detach(), *(t.grad for t in wanted), *statistics], moves_twice)
    finally:
        for t in wanted:
            t.grad = None
        for buffer, old in zip(module.buffers(), before, strict=True):
            buffer.copy_(old)


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
            torch.autograd.set_detect_anomaly(False),
            torch.device("cpu"),
        ):
            yield
    except NotFusible:
        raise
    except Exception as error:
        raise NotFusible(f"it fails when called with one tensor: {error}") from error

# SPDX-License-Identifier: Apache-2.0
"""Checks on the machine at hand that every operator and family of networks gives the numbers of plain PyTorch.

In float64 results and gradients must agree to rounding. In other types their distance from float64 must be about that
of plain PyTorch in the same type. Every check runs twice, and the second run must be bit-identical to the first.

On a GPU cuDNN is told to be deterministic. Checks of float32 do without TF32. Those of "tf32" allow it, and compare
with plain PyTorch in float16, which has as many digits: for a small convolution PyTorch itself may not use TF32.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdense._extension import _C
from fastdense._selftest_cases import NETWORKS, OPERATORS, ROUNDED_TO_TF32, WIDE_TYPES_ALONE, Case
from fastdense.fusion.convert import restore

# Of instruction sets, from the least to the most; FASTDENSE_SIMD takes the same names.
SIMD_LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
# How much further from float64 than plain PyTorch a type may be, and what is always allowed: a few roundings, more of
# them where plain PyTorch does not know the type, or where cuDNN has another algorithm for each layout of float32.
_RATIO, _ROUNDINGS, _MORE_ROUNDINGS = 1.5, 4.0, 32.0
_EXACT = 1e-9
_TF32 = "tf32"


class Check(NamedTuple):
    """What one check found."""

    name: str
    """Operator, or family of networks."""
    device: str
    dtype: str
    kernels: str
    """Instruction set on a CPU; fused kernels or those of the library on a GPU."""
    error: float
    """Largest distance of a result or gradient from float64, relative to its root mean square."""
    bound: float
    seconds: float
    problem: str
    """Why the check failed, and how to avoid what failed; empty if it passed."""

    @property
    def ok(self) -> bool:
        return not self.problem


def count_checks(device: str) -> int:
    """How many checks :func:`run` makes."""
    return sum(1 for _ in _checks(device))


def run(device: str = "cpu", started: Callable[[str], None] = lambda _: None) -> Iterator[Check]:
    """Checks every operator and family of networks, one after the other.

    A GPU runs the fused kernels and those of the library, or only what ``FASTDENSE_CUDA_KERNELS`` says.

    Args:
        device: "cpu" or "cuda", or a CUDA device such as "cuda:1".
        started: told what each check is, before it begins.

    Yields:
        What each check found.

    Raises:
        ValueError: for a device that is not there, or for which this build has no kernels.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"selftest: expected device to be cpu or cuda, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"selftest: expected device to be usable, got {device!r} without a CUDA GPU")
    if kind == "cuda" and _C.build_info()["cuda"] is None:
        raise ValueError(
            f"selftest: expected a build with CUDA kernels for device {device!r}, got one for the CPU only; "
            "build again with FORCE_CUDA=1"
        )
    for what, check in _checks(device):
        started(", ".join(what))
        yield check()


def _checks(device: str) -> Iterator[tuple[Sequence[str], Callable[[], Check]]]:
    is_cuda = torch.device(device).type == "cuda"
    for name, make in OPERATORS.items():
        for dtype in _types(name, is_cuda):
            for kernels in _kernels(is_cuda, dtype):
                yield (
                    (name, dtype, kernels),
                    lambda n=name, m=make, d=dtype, k=kernels: _check_operator(n, m(), device, d, k),  # type: ignore[misc]
                )
    for name, (network, size) in NETWORKS.items():
        kernels = "library" if is_cuda else _C.build_info()["simd"]  # in float64 there are no others
        yield (
            (name, kernels),
            lambda n=name, m=network, s=size, k=kernels: _check_network(n, m, s, device, k),  # type: ignore[misc]
        )
    if is_cuda:
        for kernels in _kernels(True, "bfloat16"):
            yield ("CUDA graph", kernels), lambda k=kernels: _check_graph(device, k)  # type: ignore[misc]


def _types(name: str, is_cuda: bool) -> Sequence[str]:
    if name in WIDE_TYPES_ALONE:
        return ("float64", "float32")
    tf32 = (_TF32,) if is_cuda and name in ROUNDED_TO_TF32 else ()
    return ("float64", "float32", *tf32, "bfloat16", "float16")


def _kernels(is_cuda: bool, dtype: str) -> Sequence[str]:
    """Every variant of the kernels that this machine can run."""
    info = _C.build_info()
    if not is_cuda:
        return SIMD_LEVELS[: SIMD_LEVELS.index(info["simd"]) + 1]
    if dtype == "float64":
        return ("library",)
    return ("fused", "library") if info["cuda_kernels"] == "auto" else (info["cuda_kernels"],)


@contextlib.contextmanager
def _using(kernels: str) -> Iterator[None]:
    info = _C.build_info()
    choose, before = (
        (_C.set_simd_level, info["simd"]) if kernels in SIMD_LEVELS else (_C.set_cuda_kernels, info["cuda_kernels"])
    )
    choose(kernels)
    try:
        yield
    finally:
        choose(before)


@contextlib.contextmanager
def _repeatable(tf32: bool) -> Iterator[None]:
    """cuDNN gives the same bits on every run, and float32 is rounded to TF32 only where that is checked."""
    products, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32)
    products.allow_tf32 = tf32
    try:
        with flags:
            yield
    finally:
        products.allow_tf32 = before


def _advice(kernels: str) -> str:
    """The environment variable that avoids the kernels."""
    if kernels == "fused":
        return "FASTDENSE_CUDA_KERNELS=library avoids these kernels"
    if kernels in SIMD_LEVELS[1:]:
        return f"FASTDENSE_SIMD={SIMD_LEVELS[SIMD_LEVELS.index(kernels) - 1]} avoids these kernels"
    return "fastdense.restore(model) avoids the operator"


def _step(function: Callable[[dict[str, Tensor]], Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
    """The result and the gradients of all inputs, those of a fixed random direction."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    out = function(leaves)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    gradients = torch.autograd.grad(out, list(leaves.values()), direction.to(out.device, out.dtype))
    return [out.detach(), *gradients]


def _distance(values: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """The largest root mean square of a difference, relative to that of the exact numbers."""
    worst = 0.0
    for value, right in zip(values, exact, strict=True):
        difference = (value.double().cpu() - right.cpu()).square().mean().sqrt()
        relative = float(difference / right.square().mean().sqrt().cpu().clamp_min(1e-30))
        worst = relative if not relative <= worst else worst  # a NaN stays
    return worst


def _check_operator(name: str, case: Case, device: str, dtype: str, kernels: str) -> Check:
    stored = torch.float32 if dtype == _TF32 else getattr(torch, dtype)
    like = torch.float16 if dtype == _TF32 else stored  # what plain PyTorch may be as far off as

    def measure() -> tuple[float, float, bool]:
        rounded = {name: t.to(stored) for name, t in case.inputs.items()}
        exact = _step(case.plain, {name: t.double() for name, t in rounded.items()})
        tensors = {name: t.to(device) for name, t in rounded.items()}
        with _using(kernels):
            found, again = _step(case.fast, tensors), _step(case.fast, tensors)
        same = all(map(torch.equal, found, again))
        if stored == torch.float64:
            return _distance(found, exact), _EXACT, same
        eps, is_cuda = torch.finfo(like).eps, found[0].is_cuda
        roundings = _MORE_ROUNDINGS if is_cuda and dtype == "float32" else _ROUNDINGS
        try:
            plain = _step(case.plain, {name: t.to(like) for name, t in tensors.items()})
            bound = _RATIO * _distance(plain, exact) + roundings * eps
        except NotImplementedError:
            bound = _MORE_ROUNDINGS * eps
        return _distance(found, exact), bound, same

    return _judge(name, device, dtype, kernels, measure)


def _check_network(name: str, make: Callable[[], nn.Module], size: tuple[int, ...], device: str, kernels: str) -> Check:
    def measure() -> tuple[float, float, bool]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fast = make().to(device, torch.float64)
        plain = restore(copy.deepcopy(fast))
        x = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)

        def step(net: nn.Module) -> list[Tensor]:
            net = copy.deepcopy(net)
            parameters = dict(net.named_parameters())
            made = _step(
                lambda t: torch.func.functional_call(net, {n: t[n] for n in parameters}, (t["input"],)),
                {"input": x, **parameters},
            )
            buffers = [b.double() for b in net.buffers()]
            net.eval()
            with torch.no_grad():
                return [*made, *buffers, net(x)]

        with _using(kernels):
            found, again = step(fast), step(fast)
        return _distance(found, [t.cpu() for t in step(plain)]), _EXACT, all(map(torch.equal, found, again))

    return _judge(name, device, "float64", kernels, measure)


def _check_graph(device: str, kernels: str) -> Check:
    """A captured dense block sees inputs and weights that change between replays."""

    def measure() -> tuple[float, float, bool]:
        case = OPERATORS["dense_block, growth rate 32"]()
        tensors = {name: t.to(device, torch.bfloat16) for name, t in case.inputs.items()}
        with _using(kernels), torch.no_grad():
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                case.fast(tensors)
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = case.fast(tensors)
            for t in tensors.values():
                t.mul_(1.25)
            graph.replay()
            found = out.clone()
            graph.replay()
            return _distance([found], [case.fast(tensors).double()]), 0.0, torch.equal(out, found)

    return _judge("dense_block in a CUDA graph", device, "bfloat16", kernels, measure)


def _judge(name: str, device: str, dtype: str, kernels: str, measure: Callable[[], tuple[float, float, bool]]) -> Check:
    start = time.perf_counter()
    error, bound, problem = float("nan"), float("nan"), ""
    try:
        with _repeatable(dtype == _TF32) if torch.device(device).type == "cuda" else contextlib.nullcontext():
            error, bound, same = measure()
    except Exception as raised:  # whatever it is, the other checks go on
        problem = f"{type(raised).__name__}: {str(raised).strip().partition(chr(10))[0]}"
    else:
        if not error <= bound:
            problem = f"error {error:.1e}, expected at most {bound:.1e}"
        elif not same:
            problem = "a second run gave other bits"
    if problem:
        problem += f"; {_advice(kernels)}"
    return Check(name, device, dtype, kernels, error, bound, time.perf_counter() - start, problem)

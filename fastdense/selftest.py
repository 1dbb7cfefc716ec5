# SPDX-License-Identifier: Apache-2.0
"""Checks on the machine at hand that every operator and family of networks gives the numbers of plain PyTorch.

In float64 results and gradients must agree to rounding. In other types their distance from float64 must be about that
of plain PyTorch in the same type. Every check runs twice, and the second run must be bit-identical to the first.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdense import models, ops, reference
from fastdense._choices import DualPathMemoryMode, MemoryMode, Preset
from fastdense._extension import _C
from fastdense.fusion.convert import restore

# Of instruction sets, from the least to the most; FASTDENSE_SIMD takes the same names.
SIMD_LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
# How much further from float64 than plain PyTorch a type may be, and what is always allowed: a few roundings, more of
# them where plain PyTorch does not know the type.
_RATIO, _ROUNDINGS, _ROUNDINGS_ALONE = 1.5, 4.0, 32.0
_EXACT = 1e-9


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


class _Case(NamedTuple):
    """Tensors, and what is computed of them by fastdense and by plain PyTorch; a result is one tensor."""

    inputs: dict[str, Tensor]
    fast: Callable[[dict[str, Tensor]], Tensor]
    plain: Callable[[dict[str, Tensor]], Tensor]


class _Numbers:
    """Random tensors of a fixed seed, independent of torch's own generators."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.made: dict[str, Tensor] = {}

    def normal(self, name: str, *size: int, scale: float = 1.0, shift: float = 0.0) -> str:
        self.made[name] = torch.randn(size, generator=self.generator, dtype=torch.float64) * scale + shift
        return name

    def weight(self, name: str, *size: int) -> str:
        fan = 1
        for n in size[1:]:
            fan *= n
        return self.normal(name, *size, scale=fan**-0.5)

    def norm(self, name: str, channels: int) -> str:
        self.normal(f"{name}.weight", channels, scale=0.2, shift=1.0)
        self.normal(f"{name}.bias", channels, scale=0.2)
        return name


def _norm(t: dict[str, Tensor], name: str, groups: int = 0) -> ops.NormWeights:
    return ops.NormWeights(t[f"{name}.weight"], t[f"{name}.bias"], None, None, 1e-5, groups)


def _dense_block(size: tuple[int, ...], memory: MemoryMode, groups: int = 0, act: str = "relu") -> _Case:
    """``groups`` of channels share the statistics of each sample; then the 3x3 convolutions have a bias."""
    n, dims = _Numbers(1), len(size)
    channels, growth, width, layers = 24, 16, 64, 3
    n.normal("input", 2, channels, *size, shift=0.5)
    for at in range(layers):
        n.norm(f"{at}.norm1", channels + at * growth)
        n.weight(f"{at}.conv1", width, channels + at * growth, *[1] * dims)
        n.norm(f"{at}.norm2", width)
        n.weight(f"{at}.conv2", growth, width, *[3] * dims)
        if groups > 0:
            n.normal(f"{at}.bias", growth)
    n.norm("tail", channels + layers * growth)
    n.weight("tail.conv", 16, channels + layers * growth, *[1] * dims)
    if act == "prelu":
        n.normal("slope", 1, shift=0.2, scale=0.1)

    def arguments(t: dict[str, Tensor]) -> tuple[Tensor, list[ops.LayerWeights], ops.TailWeights]:
        activation = ops.Activation(act, weight=t.get("slope"))
        made = [
            ops.LayerWeights(
                _norm(t, f"{at}.norm1", groups),
                t[f"{at}.conv1"],
                _norm(t, f"{at}.norm2", groups),
                t[f"{at}.conv2"],
                activation,
                activation,
                bias2=t.get(f"{at}.bias"),
            )
            for at in range(layers)
        ]
        return t["input"], made, ops.TailWeights(_norm(t, "tail", groups), t["tail.conv"], act=activation)

    def fast(t: dict[str, Tensor]) -> Tensor:
        x, made, tail = arguments(t)
        return ops.dense_block(x, made, tail=tail, memory=memory)[0]

    def plain(t: dict[str, Tensor]) -> Tensor:
        x, made, tail = arguments(t)
        return reference.dense_block(x, made, tail=tail)[0]

    return _Case(n.made, fast, plain)


def _dual_path_stage(memory: DualPathMemoryMode, width: int = 32, groups: int = 4, stride: int = 1) -> _Case:
    n = _Numbers(2)
    channels, residual, growth, blocks, dense = 24, 32, 8, 2, 16
    n.normal("input", 2, channels, 9, 7, shift=0.5)
    n.norm("projection", channels)
    n.weight("projection.conv", residual + dense, channels, 1, 1)
    for at in range(blocks):
        reads = channels if at == 0 else residual + dense + at * growth
        n.norm(f"{at}.a", reads)
        n.weight(f"{at}.conv_a", width, reads, 1, 1)
        n.norm(f"{at}.b", width)
        n.weight(f"{at}.conv_b", width, width // groups, 3, 3)
        n.norm(f"{at}.c", width)
        n.weight(f"{at}.conv_c", residual + growth, width, 1, 1)

    def arguments(t: dict[str, Tensor]) -> tuple[Tensor, list[ops.DualPathWeights], ops.ProjectionWeights]:
        made = [
            ops.DualPathWeights(
                _norm(t, f"{at}.a"),
                t[f"{at}.conv_a"],
                _norm(t, f"{at}.b"),
                t[f"{at}.conv_b"],
                _norm(t, f"{at}.c"),
                t[f"{at}.conv_c"],
            )
            for at in range(blocks)
        ]
        return t["input"], made, ops.ProjectionWeights(_norm(t, "projection"), t["projection.conv"])

    def fast(t: dict[str, Tensor]) -> Tensor:
        x, made, projection = arguments(t)
        return ops.dual_path_stage(
            x, made, residual_channels=residual, projection=projection, stride=stride, memory=memory
        )[0]

    def plain(t: dict[str, Tensor]) -> Tensor:
        x, made, projection = arguments(t)
        return reference.dual_path_stage(x, made, residual_channels=residual, projection=projection, stride=stride)[0]

    return _Case(n.made, fast, plain)


def _residual_dense_block() -> _Case:
    n = _Numbers(3)
    channels, growth, layers = 16, 8, 3
    n.normal("input", 1, channels, 13, 11)
    for at in range(layers + 1):
        out = growth if at < layers else channels
        n.weight(f"{at}.weight", out, channels + at * growth, 3, 3)
        n.normal(f"{at}.bias", out)

    def convs(t: dict[str, Tensor]) -> list[ops.ConvWeights]:
        return [ops.ConvWeights(t[f"{at}.weight"], t[f"{at}.bias"]) for at in range(layers + 1)]

    return _Case(
        n.made,
        lambda t: ops.residual_dense_block(t["input"], convs(t)[:-1], convs(t)[-1], scale=0.2),
        lambda t: reference.residual_dense_block(t["input"], convs(t)[:-1], convs(t)[-1], scale=0.2),
    )


def _norm_relu_max_pool() -> _Case:
    n = _Numbers(4)
    n.normal("input", 2, 16, 15, 12)
    n.norm("norm", 16)
    window: tuple[Any, ...] = ((3, 3), (2, 2), (1, 1))
    return _Case(
        n.made,
        lambda t: ops.norm_relu_max_pool(t["input"], _norm(t, "norm"), *window)[0],
        lambda t: reference.norm_relu_max_pool(t["input"], _norm(t, "norm"), *window)[0],
    )


def _highway_gate() -> _Case:
    n = _Numbers(5)
    n.normal("input", 2, 12, 6, 5)
    n.normal("projection", 2, 24, 6, 5)

    def plain(t: dict[str, Tensor]) -> Tensor:
        h, gate = t["projection"].chunk(2, 1)
        gate = gate.sigmoid()
        return h.relu() * gate + t["input"] * (1 - gate)

    return _Case(n.made, lambda t: ops.highway_gate(t["input"], t["projection"], "relu"), plain)


def _mean_join() -> _Case:
    n = _Numbers(6)
    names = [n.normal(f"input{at}", 2, 12, 6, 5) for at in range(3)]
    return _Case(
        n.made,
        lambda t: ops.mean_join([t[name] for name in names]),
        lambda t: reference.mean_join([t[name] for name in names]),
    )


def _dual_path_merge() -> _Case:
    n = _Numbers(7)
    n.normal("input", 2, 24, 6, 5)
    n.normal("features", 2, 24, 6, 5)

    def plain(t: dict[str, Tensor]) -> Tensor:
        x, z = t["input"], t["features"]
        return torch.cat([x[:, :16] + z[:, :16], x[:, 16:], z[:, 16:]], 1)

    return _Case(n.made, lambda t: ops.dual_path_merge(t["input"], t["features"], 16), plain)


def _bicubic(scale: float) -> _Case:
    n = _Numbers(8)
    n.normal("input", 1, 3, 17, 20)
    antialias = scale < 1

    def plain(t: dict[str, Tensor]) -> Tensor:
        # Computed in float64 wherever torch's own kernel rounds its coefficients to the type of the input.
        return F.interpolate(t["input"], scale_factor=scale, mode="bicubic", antialias=antialias)

    preset: Preset = "torch_antialias" if antialias else "torch"
    return _Case(n.made, lambda t: ops.bicubic_resize(t["input"], scale_factor=scale, preset=preset), plain)


OPERATORS: dict[str, Callable[[], _Case]] = {
    "dense_block": lambda: _dense_block((9, 7), "balanced"),
    "dense_block, memory=min": lambda: _dense_block((9, 7), "min"),
    "dense_block, 3-D": lambda: _dense_block((5, 4, 6), "balanced"),
    "dense_block, batch norm, SiLU": lambda: _dense_block((9, 7), "balanced", act="silu"),
    "dense_block, group norm, PReLU": lambda: _dense_block((9, 7), "min", groups=4, act="prelu"),
    "dual_path_stage": lambda: _dual_path_stage("balanced"),
    "dual_path_stage, strided": lambda: _dual_path_stage("min", 48, 16, 2),  # groups that chunks of channels cut
    "dual_path_stage, reversible": lambda: _dual_path_stage("reversible"),
    "residual_dense_block": _residual_dense_block,
    "norm_relu_max_pool": _norm_relu_max_pool,
    "highway_gate": _highway_gate,
    "mean_join": _mean_join,
    "dual_path_merge": _dual_path_merge,
    "bicubic_resize, x2": lambda: _bicubic(2.0),
    "bicubic_resize, x0.5": lambda: _bicubic(0.5),
}

# What the operator, or plain PyTorch, takes in float64 and float32 only.
_WIDE_TYPES_ALONE = ("dense_block, 3-D", "dual_path_stage, reversible")

# One small network of each family that fuses modules, and the size of its input.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "DenseNet": (lambda: models.densenet_cifar(22, 8), (4, 3, 16, 16)),
    "DenseNet, memory=min": (lambda: models.densenet_cifar(22, 8, memory="min"), (4, 3, 16, 16)),
    "FC-DenseNet": (
        lambda: models.FCDenseNet(8, (2, 2), 2, (2, 2), init_features=16, drop_rate=0.0),
        (1, 3, 16, 16),
    ),
    "DPN": (
        lambda: models.DPN(
            stem_channels=8,
            stem_kernel=3,
            width=16,
            groups=4,
            blocks=(1, 2, 1, 1),
            growth_rates=(4, 4, 4, 4),
            residual_channels=16,
            num_classes=10,
        ),
        (2, 3, 32, 32),
    ),
    "RRDBNet": (lambda: models.RRDBNet(4, blocks=1, width=16, growth_rate=8), (1, 3, 12, 12)),
    "RDN": (lambda: models.rdn(2, blocks=2, layers=3, width=16), (1, 3, 12, 12)),
    "SRDenseNet": (models.srdensenet, (1, 1, 8, 8)),
}


def count_checks(device: str) -> int:
    """How many checks :func:`run` makes."""
    return sum(1 for _ in _checks(device))


def run(device: str = "cpu") -> Iterator[Check]:
    """Checks every operator and family of networks, one after the other.

    Args:
        device: "cpu" or "cuda", or a CUDA device such as "cuda:1".

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
    for check in _checks(device):
        yield check()


def _checks(device: str) -> Iterator[Callable[[], Check]]:
    is_cuda = torch.device(device).type == "cuda"
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for name, make in OPERATORS.items():
        for dtype in dtypes[:2] if name in _WIDE_TYPES_ALONE else dtypes:
            for kernels in _kernels(is_cuda, dtype):
                yield lambda n=name, m=make, d=dtype, k=kernels: _check_operator(n, m(), device, d, k)  # type: ignore[misc]
    for name, (network, size) in NETWORKS.items():
        for kernels in ("fused", "library") if is_cuda else (_C.build_info()["simd"],):
            yield lambda n=name, m=network, s=size, k=kernels: _check_network(n, m, s, device, k)  # type: ignore[misc]
    if is_cuda:
        for kernels in ("fused", "library"):
            yield lambda k=kernels: _check_graph(device, k)  # type: ignore[misc]


def _kernels(is_cuda: bool, dtype: torch.dtype) -> Sequence[str]:
    """Every variant of the kernels that this machine can run."""
    if is_cuda:
        return ("library",) if dtype == torch.float64 else ("fused", "library")
    return SIMD_LEVELS[: SIMD_LEVELS.index(_C.build_info()["simd"]) + 1]


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


def _check_operator(name: str, case: _Case, device: str, dtype: torch.dtype, kernels: str) -> Check:
    def measure() -> tuple[float, float, bool]:
        rounded = {name: t.to(dtype) for name, t in case.inputs.items()}
        exact = _step(case.plain, {name: t.double() for name, t in rounded.items()})
        tensors = {name: t.to(device) for name, t in rounded.items()}
        with _using(kernels):
            found, again = _step(case.fast, tensors), _step(case.fast, tensors)
        same = all(map(torch.equal, found, again))
        if dtype == torch.float64:
            return _distance(found, exact), _EXACT, same
        eps = torch.finfo(dtype).eps
        try:
            bound = _RATIO * _distance(_step(case.plain, tensors), exact) + _ROUNDINGS * eps
        except NotImplementedError:
            bound = _ROUNDINGS_ALONE * eps
        return _distance(found, exact), bound, same

    return _judge(name, device, str(dtype).removeprefix("torch."), kernels, measure)


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
        case = _dense_block((9, 7), "balanced")
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

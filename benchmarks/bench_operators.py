# SPDX-License-Identifier: Apache-2.0
"""Every native operator, forward and backward, next to the plain PyTorch that it replaces.

Run ``make bench``, or ``pytest benchmarks/bench_operators.py --benchmark-only -k mean_join``. Outputs and gradients are
compared before anything is timed. Dense blocks and bicubic resampling have files of their own.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdense
from fastdense import bicubic_resize
from fastdense.ops import (
    NormWeights,
    dropout_mask,
    dual_path_merge,
    highway_gate,
    mean_join,
    norm_relu_max_pool,
    update_running_stats_,
)

Run = Callable[[], Any]


class Pair(NamedTuple):
    """An operator and plain PyTorch on the same inputs; those that require a gradient get one."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: list[Tensor]


def features(batch: int, channels: int, side: int, layout: torch.memory_format) -> Tensor:
    return torch.randn(batch, channels, side, side).to(memory_format=layout).requires_grad_()


def merge(batch: int, layout: torch.memory_format) -> Pair:
    residual = 256  # the third block of a DPN-92's first stage

    def plain(x: Tensor, z: Tensor) -> Tensor:
        return torch.cat([x[:, :residual] + z[:, :residual], x[:, residual:], z[:, residual:]], 1)

    inputs = [features(batch, residual + 64, 56, layout), features(batch, residual + 16, 56, layout)]
    return Pair(lambda x, z: dual_path_merge(x, z, residual), plain, inputs)


def gate(batch: int, layout: torch.memory_format) -> Pair:
    def plain(x: Tensor, projection: Tensor) -> Tensor:
        h, t = projection.chunk(2, 1)
        return x + t.sigmoid() * (h.relu() - x)

    return Pair(highway_gate, plain, [features(batch, 64, 56, layout), features(batch, 128, 56, layout)])


def join(count: int) -> Callable[[int, torch.memory_format], Pair]:
    def made(batch: int, layout: torch.memory_format) -> Pair:
        inputs = [features(batch, 64, 56, layout) for _ in range(count)]
        return Pair(lambda *xs: mean_join(xs), lambda *xs: torch.stack(xs).mean(0), inputs)

    return made


def stem(batch: int, layout: torch.memory_format) -> Pair:
    weight, bias = torch.rand(64).requires_grad_(), torch.randn(64).requires_grad_()
    pool = [3, 3], [2, 2], [1, 1]

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm_relu_max_pool(x, NormWeights(weight, bias, None, None, 1e-5), *pool)[0]

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(F.batch_norm(x, None, None, weight, bias, True)), *pool)

    return Pair(ours, plain, [features(batch, 64, 112, layout), weight, bias])


def blocks(ours: nn.Module, plain: nn.Module, input: Tensor) -> Pair:
    """Two modules with the same weights, of which one calls the operator."""
    fastdense.restore(plain).load_state_dict(ours.state_dict())
    parameters = [parameter for module in (ours, plain) for parameter in module.parameters()]
    for parameter in parameters:  # their gradients are computed, but not compared one by one
        parameter.grad = None
    return Pair(ours, plain, [input])


def stage(batch: int, layout: torch.memory_format) -> Pair:
    def made() -> nn.Module:
        return fastdense.nn.DualPathStage(3, 64, 96, 256, 16, groups=32).to(memory_format=layout)

    return blocks(made(), made(), features(batch, 64, 28, layout))


def residual_block(batch: int, layout: torch.memory_format) -> Pair:
    def made() -> nn.Module:
        return fastdense.nn.ResidualDenseBlock(64, 32, 4).to(memory_format=layout)

    return blocks(made(), made(), features(batch, 64, 32, layout))


def mask(batch: int, _: torch.memory_format) -> Pair:
    rows, channels, rate = batch * 56 * 56, 32, 0.2

    def ours(seed: Tensor) -> Tensor:
        return dropout_mask(seed, 0, rows, channels, rate)

    return Pair(ours, lambda seed: torch.rand(rows, channels) >= rate, [torch.tensor(7)])


def running_stats(_: int, __: torch.memory_format) -> Pair:
    norms, channels, momentum = 48, 128, 0.1
    mean, var = torch.randn(norms * channels), torch.rand(norms * channels)
    offsets = [channels * i for i in range(norms)]

    def buffers() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return (
            [torch.zeros(channels) for _ in range(norms)],
            [torch.ones(channels) for _ in range(norms)],
            [torch.tensor(0) for _ in range(norms)],
        )

    our_buffers, plain_buffers = buffers(), buffers()

    def ours(mean: Tensor, var: Tensor) -> Tensor:
        update_running_stats_(*our_buffers, mean, var, offsets, [momentum] * norms, 1000)
        return our_buffers[1][-1]

    def plain(mean: Tensor, var: Tensor) -> Tensor:
        for running_mean, running_var, batches, m, v in zip(
            *plain_buffers, mean.split(channels), var.split(channels), strict=True
        ):
            running_mean.lerp_(m, momentum)
            running_var.lerp_(v * (1000 / 999), momentum)
            batches.add_(1)
        return plain_buffers[1][-1]

    return Pair(ours, plain, [mean, var])


def bytes_up(batch: int, layout: torch.memory_format) -> Pair:
    picture = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8).to(memory_format=layout)

    def plain(x: Tensor) -> Tensor:
        return F.interpolate(x, (512, 512), mode="bicubic", antialias=True)

    return Pair(lambda x: bicubic_resize(x, (512, 512), preset="pillow"), plain, [picture])


# The first word is the operator.
CASES: dict[str, Callable[[int, torch.memory_format], Pair]] = {
    "dual_path_stage": stage,
    "dual_path_merge": merge,  # backward: dual_path_split
    "highway_gate": gate,
    "mean_join of 2": join(2),
    "mean_join of 4": join(4),
    "norm_relu_max_pool": stem,
    "residual_dense_block": residual_block,
    "dropout_mask": mask,
    "update_running_stats_": running_stats,
    "bicubic_uint8": bytes_up,
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# ReLUs behind batch norms: in float32 a value next to zero may pass in one module and not in the other. Gradients then
# differ by more than rounding, and both are right; in float64 that does not happen.
GRADIENTS_IN_FLOAT64 = {"dual_path_stage"}
WITHOUT_LAYOUT = {"dropout_mask", "update_running_stats_"}
WITHOUT_BACKWARD = WITHOUT_LAYOUT | {"bicubic_uint8"}


def compare(name: str, ours: Tensor, plain: Tensor, tolerance: float = 1e-4) -> None:
    """A wrong result is not timed."""
    if name == "dropout_mask":  # another generator: as many elements, and others
        assert ours.shape == plain.shape
        assert abs(ours.float().mean() - plain.float().mean()) < 1e-2
    elif name == "bicubic_uint8":
        assert (ours.int() - plain.int()).abs().max() <= 1
    else:
        assert (ours - plain).norm() <= tolerance * plain.norm()


def parameters_of(call: Callable[..., Tensor]) -> list[nn.Parameter]:
    return list(call.parameters()) if isinstance(call, nn.Module) else []


def compare_gradients(name: str, pair: Pair) -> None:
    """In float64, which must agree to a few of its digits."""
    inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in pair.inputs]
    calls = [copy.deepcopy(c).double() if isinstance(c, nn.Module) else c for c in (pair.ours, pair.plain)]
    outputs = [call(*inputs) for call in calls]
    grad = torch.randn_like(outputs[0])
    wanted = [x for x in inputs if x.requires_grad]
    made = [
        torch.autograd.grad(output, [*wanted, *parameters_of(call)], grad)
        for output, call in zip(outputs, calls, strict=True)
    ]
    for ours, plain in zip(*made, strict=True):
        compare(name, ours, plain, 1e-9)


def make_runs(name: str, layout: str, batch: int = 8) -> dict[str, dict[str, Run]]:
    """What is timed, by direction and variant."""
    torch.manual_seed(0)
    pair = CASES[name](batch, LAYOUTS[layout])
    calls = {"torch": pair.plain, "fastdense": pair.ours}
    outputs = {variant: call(*pair.inputs) for variant, call in calls.items()}
    compare(name, outputs["fastdense"], outputs["torch"])

    def forward(call: Callable[..., Tensor]) -> Run:
        def run() -> None:
            with torch.no_grad():
                call(*pair.inputs)

        return run

    runs = {"forward": {variant: forward(call) for variant, call in calls.items()}}
    wanted = [x for x in pair.inputs if x.requires_grad]
    if not wanted:
        return runs
    grad = torch.randn_like(outputs["torch"])

    def backward(call: Callable[..., Tensor], output: Tensor) -> Run:
        return lambda: torch.autograd.grad(output, [*wanted, *parameters_of(call)], grad, retain_graph=True)

    runs["backward"] = {variant: backward(calls[variant], output) for variant, output in outputs.items()}
    if name in GRADIENTS_IN_FLOAT64:
        compare_gradients(name, pair)
        return runs
    for ours, plain in zip(*(runs["backward"][variant]() for variant in ("fastdense", "torch")), strict=True):
        compare(name, ours, plain)
    return runs


@pytest.mark.parametrize("variant", ["torch", "fastdense"])
@pytest.mark.parametrize(
    ("name", "layout", "direction"),
    [
        (name, layout, direction)
        for name in CASES
        for layout in (["contiguous"] if name in WITHOUT_LAYOUT else LAYOUTS)
        for direction in (["forward"] if name in WITHOUT_BACKWARD else ["forward", "backward"])
    ],
)
def test_operator(benchmark, name: str, layout: str, direction: str, variant: str) -> None:
    run = make_runs(name, layout)[direction][variant]
    benchmark.group = f"{name} {direction}, {layout}"
    benchmark.pedantic(run, rounds=9, warmup_rounds=2)

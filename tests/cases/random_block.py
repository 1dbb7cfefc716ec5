# SPDX-License-Identifier: Apache-2.0
"""Random parameters of a block operator, and its comparison with the reference."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdense.ops import NormWeights


class RandomBlock:
    """Base of the operators' test blocks: named parameters, made from a case.

    A case has the fields ``dtype``, ``affine`` and ``frozen``, parts of the names of norms that use running statistics;
    it may have a ``device``. Norms take the statistics of each sample where it has ``norm_groups``: -1 for as many
    groups as channels, else as many as divide both. Subclasses make ``input``, and run the operator and the reference
    by ``run`` and ``expected``.
    """

    input: Tensor
    process_group = ""

    def __init__(self, case: Any, seed: int = 0) -> None:
        self.case = case
        self.device: str = getattr(case, "device", "cpu")
        self.random = torch.Generator().manual_seed(seed)
        self.names: list[str] = []
        self.parameters: list[Tensor] = []

    def run(self, memory: str | None = None) -> Any:
        raise NotImplementedError

    def expected(self) -> Any:
        raise NotImplementedError

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64).to(self.device, self.case.dtype)

    def add(self, name: str, value: Tensor) -> Tensor:
        self.names.append(name)
        self.parameters.append(value.requires_grad_())
        return value

    def weight(self, name: str, *shape: int) -> Tensor:
        fan = torch.Size(shape[1:]).numel()
        return self.add(name, self.normal(*shape) * (2 / fan) ** 0.5)

    def norm(self, name: str, channels: int, eps: float) -> NormWeights:
        weight = bias = mean = var = None
        if self.case.affine:
            weight = self.add(f"{name}.weight", self.normal(channels).abs() + 0.5)
            bias = self.add(f"{name}.bias", self.normal(channels) * 0.3)
        if any(part in name for part in self.case.frozen):
            mean, var = self.normal(channels) * 0.2, self.normal(channels).abs() + 0.5
        groups = getattr(self.case, "norm_groups", 0)
        groups = channels if groups < 0 else math.gcd(channels, groups) if groups > 0 else 0
        return NormWeights(weight, bias, mean, var, eps, groups)

    def gradients(self, out: Tensor, grad: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """By name; nothing for what takes no part."""
        grads = torch.autograd.grad(out, [self.input, *self.parameters], grad, allow_unused=True, **kwargs)
        return {name: g for name, g in zip(["input", *self.names], grads, strict=True) if g is not None}

    def saved_numbers(self) -> int:
        """Numbers that a run keeps for its backward pass, parameters and input apart."""
        own = {p.untyped_storage().data_ptr() for p in [self.input, *self.parameters]}
        saved = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.run()
        return sum(count for at, count in saved.items() if at not in own)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def check(block: RandomBlock, tolerance: float | None = None) -> None:
    """Output, batch statistics and all gradients against the reference.

    That of a bias, which may vanish but for rounding, is compared with a hundredth of the largest.
    """
    tolerance = tolerance or (1e-12 if block.device == "cpu" else 1e-10)
    out, statistics = block.run()
    expected, expected_statistics = block.expected()
    grad = block.normal(*expected.shape)
    errors = {"out": relative(out, expected)}
    if len(block.case.frozen) == 0:
        errors["mean"] = relative(statistics.mean, expected_statistics.mean)
        errors["var"] = relative(statistics.var, expected_statistics.var)
    actual, wanted = block.gradients(out, grad), block.gradients(expected, grad)
    assert actual.keys() == wanted.keys()
    largest = max(g.norm() for g in wanted.values())
    for name, gradient in wanted.items():
        scale = gradient.norm().clamp_min(1e-2 * largest if name.endswith("bias") else 1e-30)
        errors[name] = ((actual[name] - gradient).norm() / scale).item()
    wrong = {name: error for name, error in errors.items() if not error < tolerance}  # a NaN is wrong
    assert not wrong, wrong


def low_precision_errors(make: Callable[[Any], RandomBlock], case: Any) -> tuple[list[float], list[float]]:
    """Errors against float64 of the output and all gradients: ours, and those of torch in the same type."""
    exact, low = make(replace(case, dtype=torch.float64)), make(case)
    with torch.no_grad():
        for target, source in zip([low.input, *low.parameters], [exact.input, *exact.parameters], strict=True):
            source.copy_(target)
    truth, _ = exact.expected()
    grad = exact.normal(*truth.shape)
    wanted = exact.gradients(truth, grad)

    def errors(run: Callable[[], Any]) -> list[float]:
        out, _ = run()
        assert out.dtype == case.dtype
        got = low.gradients(out, grad.to(case.dtype))
        return [relative(out.double(), truth)] + [relative(got[n].double(), wanted[n]) for n in wanted]

    return errors(low.run), errors(low.expected)


def check_bit_identical(block: RandomBlock, modes: Sequence[str]) -> None:
    """Every memory mode, and every rerun, gives the same bits."""
    results = [block.run(memory) for memory in modes]
    grad = torch.ones_like(results[0][0])
    gradients = [block.gradients(out, grad) for out, _ in results]
    for (out, statistics), grads in zip(results[1:], gradients[1:], strict=True):
        assert torch.equal(out, results[0][0])
        assert torch.equal(statistics.var, results[0][1].var)
        assert all(torch.equal(grads[name], gradients[0][name]) for name in grads)


def check_one_gradient(block: RandomBlock, part: str, memory: str = "balanced") -> None:
    """Where the input or one parameter alone needs a gradient, that one is right."""
    expected, _ = block.expected()
    grad = block.normal(*expected.shape)
    wanted = block.gradients(expected, grad)[part]
    for name, tensor in zip(["input", *block.names], [block.input, *block.parameters], strict=True):
        tensor.requires_grad_(name == part)
    leaf = block.input if part == "input" else block.parameters[block.names.index(part)]
    out, _ = block.run(memory)
    (actual,) = torch.autograd.grad(out, [leaf], grad)
    assert relative(actual, wanted) < 1e-12


def check_any_output_gradient(block: RandomBlock) -> None:
    """Expanded and strided output gradients are left alone, and a graph may be gone through twice."""
    out, _ = block.run()
    expected, _ = block.expected()
    for grad in (
        torch.ones((), dtype=out.dtype, device=out.device).expand_as(out),
        block.normal(*out.shape, 2)[..., 0],
    ):
        before = grad.clone()
        actual = block.gradients(out, grad, retain_graph=True)
        wanted = block.gradients(expected, grad, retain_graph=True)
        again = block.gradients(out, grad, retain_graph=True)
        assert torch.equal(grad, before)
        for name in wanted:
            assert relative(actual[name], wanted[name]) < 1e-12
            assert torch.equal(actual[name], again[name])

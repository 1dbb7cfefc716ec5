# SPDX-License-Identifier: Apache-2.0
"""Hooks on saved tensors may lay them out otherwise: gradients stay what they are."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from tests.cases.families import MODES, pair
from tests.cases.fused_modules import MODULES, differences, make, step


def halve(t: Tensor) -> Any:
    """As a quantiser does it, which needs the largest number; without a loss."""
    return (t.contiguous() / 2, t.abs().max()) if t.is_floating_point() else (t, t.max())


def unhalve(packed: Any) -> Tensor:
    t, _ = packed
    return t * 2 if t.is_floating_point() else t


def scattered(t: Tensor) -> Tensor:
    """With gaps between all numbers, and the first dimension innermost."""
    moved = t.movedim(0, -1) if t.dim() > 0 else t
    wide = torch.stack([moved, torch.full_like(moved, 7)], -1)[..., 0]
    return wide.movedim(-1, 0) if t.dim() > 0 else wide


HOOKS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "save_on_cpu": lambda: save_on_cpu(),
    "save_on_cpu, pinned": lambda: save_on_cpu(pin_memory=True),
    "contiguous": lambda: saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t),
    "numpy": lambda: saved_tensors_hooks(lambda t: t.detach().numpy().copy("C"), torch.from_numpy),
    "quantised": lambda: saved_tensors_hooks(halve, unhalve),
    "scattered": lambda: saved_tensors_hooks(scattered, lambda t: t),
}


def gradients(net: nn.Module, x: Tensor, hook: str) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    with HOOKS[hook]():
        out = net(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).cos().view(out.shape)
    parameters = dict(net.named_parameters())
    grads = torch.autograd.grad((out * weights).sum(), [x, *parameters.values()])
    return dict(zip(["input", *parameters], grads, strict=True))


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name, memory", MODES)
def test_converted_networks(name, memory, hook):
    plain, fast, x = pair(name, memory)
    expected, found = gradients(plain, x, hook), gradients(fast, x, hook)
    largest = max(g.norm() for g in expected.values())
    for parameter, wanted in expected.items():
        assert (found[parameter] - wanted).norm() <= 1e-9 * (wanted.norm() + 1e-3 * largest), parameter


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", MODULES)
def test_every_operator_gives_the_same_bits(name, hook):
    module, x = make(name)
    expected = step(module, x)
    module, x = make(name)
    with HOOKS[hook]():
        assert differences(step(module, x), expected) == []


def test_hooks_see_no_empty_tensors():
    """The operator takes many that stand for running statistics, which it does not use in training."""
    _, fast, x = pair("dense block", "min")
    sizes: list[int] = []
    with saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        fast(x)
    assert sizes and min(sizes) > 0

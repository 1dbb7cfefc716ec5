# SPDX-License-Identifier: Apache-2.0
"""Random models that are changed between their steps: converted ones give the plain ones' numbers at each.

``make fuzz`` tries 2,000 seeds.
"""

import contextlib
import copy
import os
import warnings
from random import Random

import pytest
import torch
from torch import Tensor, nn

import fastdense
from tests.cases.converted import assert_same
from tests.cases.random_models import CHANGES, change, random_model
from tests.test_saved_tensors import HOOKS

SEEDS = 2000 if os.environ.get("HYPOTHESIS_PROFILE") == "fuzz" else 120
STEPS = 3


def laid_out(x: Tensor, random: Random) -> Tensor:
    """The input as some program hands it over."""
    return random.choice(
        (
            lambda: x,
            lambda: x.movedim(1, -1).contiguous().movedim(-1, 1),
            lambda: torch.cat([x, x], 1)[:, : x.shape[1]],
            lambda: x[:1].expand_as(x),
        )
    )()


def step(net: nn.Module, x: Tensor, hook: str | None) -> dict[str, Tensor]:
    """Output, gradients and buffers of a step."""
    net.zero_grad()
    given = x.detach().requires_grad_()
    with HOOKS[hook]() if hook else contextlib.nullcontext():
        out = net(given)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).cos().view(out.shape)
    out.backward(grad)
    made = {"out": out.detach(), "grad input": given.grad.clone()}
    made |= {f"grad {name}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return made | {f"buffer {name}": b.clone() for name, b in net.named_buffers()}


@pytest.mark.parametrize("seed", range(SEEDS))
def test_same_numbers_whatever_is_done(seed):
    random = Random(seed)
    plain, x = random_model(random)
    story = []
    fast = copy.deepcopy(plain)
    if random.random() < 0.5:
        story.append(random.choice(CHANGES))
        for net in (plain, fast):
            change(net, story[-1], seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fastdense")
        fastdense.convert(fast, memory=random.choice(("balanced", "min", "recompute")))
        for _ in range(STEPS):
            given, hook = laid_out(x, random), random.choice([None, *HOOKS])
            try:
                expected = step(plain, given, hook)
            except (RuntimeError, TypeError):  # torch refuses the change, as a weight norm does such hooks
                return
            try:
                assert_same(step(fast, given, hook), expected, 1e-8)
            except AssertionError as error:
                raise AssertionError(
                    f"{type(plain).__name__}, {[c.__name__ for c in story]}, {hook}: {error}"
                ) from None
            story.append(random.choice(CHANGES))
            for net in (plain, fast):
                change(net, story[-1], seed + len(story))
            if random.random() < 0.2:
                plain, fast = copy.deepcopy(plain), copy.deepcopy(fast)

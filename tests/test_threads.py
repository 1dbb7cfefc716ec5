# SPDX-License-Identifier: Apache-2.0
"""Several threads go backward through one graph at once, and each gets the gradients that one gets alone."""

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

import fastdense
from tests.cases.any_layers import C0, Block
from tests.cases.converted import randomise
from tests.cases.families import FAMILIES, pair
from tests.cases.fused_modules import MODULES, make
from tests.test_double_backward import gelu_dual_path

THREADS, PASSES = 4, 12


def check_backward_from_threads(module: nn.Module, x: Tensor) -> None:
    x = x.requires_grad_()
    loss = module(x).square().sum()
    tensors = [x, *module.parameters()]
    expected = torch.autograd.grad(loss, tensors, retain_graph=True)
    wrong: list[str] = []
    start = threading.Barrier(THREADS)

    def work() -> None:
        start.wait()
        for _ in range(PASSES):
            try:
                grads = torch.autograd.grad(loss, tensors, retain_graph=True)
            except Exception as error:
                wrong.append(repr(error))
            else:
                if not all(map(torch.equal, grads, expected)):
                    wrong.append("other gradients")

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("name", MODULES)
def test_operators(one_thread, name):
    check_backward_from_threads(*make(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_networks(one_thread, name):
    _, fast, x = pair(name, FAMILIES[name].memory[-1])
    check_backward_from_threads(fast, x)


SHARED = {"layers": Block, "dual path": gelu_dual_path}


def shared(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    fast = fastdense.convert(nn.Sequential(randomise(SHARED[name]().double())), memory="min")
    assert {row.runs for row in fastdense.report(fast).rows} == {"shared buffer"}
    return fast, torch.randn(2, C0, 9, 8, dtype=torch.float64)


@pytest.mark.parametrize("name", SHARED)
def test_shared_buffers(one_thread, name):
    check_backward_from_threads(*shared(name))


@pytest.mark.parametrize("name", SHARED)
def test_steps_on_a_shared_buffer(one_thread, name):
    """A backward pass puts other tensors in the places of parameters, which no other thread may find there."""
    fast, x = shared(name)
    parameters = list(fast.parameters())
    inputs = [x * (1 + at) for at in range(THREADS)]
    plain = fastdense.restore(copy.deepcopy(fast))
    expected = [gradients(plain, list(plain.parameters()), x) for x in inputs]
    counters = [b for b in fast.buffers() if b.dtype == torch.int64]
    wrong: list[str] = []
    start = threading.Barrier(THREADS)

    def work(at: int) -> None:
        start.wait()
        for _ in range(PASSES):
            try:
                made = gradients(fast, parameters, inputs[at])
            except Exception as error:
                wrong.append(repr(error))
            else:
                if any((a - b).norm() > 1e-9 * b.norm() for a, b in zip(made, expected[at], strict=True)):
                    wrong.append("other gradients")

    threads = [threading.Thread(target=work, args=(at,)) for at in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert {int(counter) for counter in counters} == {THREADS * PASSES}


def gradients(module: nn.Module, parameters: list[nn.Parameter], x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(module(x).square().sum(), [x, *parameters])

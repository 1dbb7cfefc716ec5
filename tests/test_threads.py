# SPDX-License-Identifier: Apache-2.0
"""Several threads go backward through one graph at once, and each gets the gradients that one gets alone."""

import threading

import pytest
import torch
from torch import Tensor, nn

from tests.cases.families import FAMILIES, pair
from tests.cases.fused_modules import MODULES, make

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

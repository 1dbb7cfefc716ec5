# SPDX-License-Identifier: Apache-2.0
"""Reruns are bit-identical: on memory full of NaN, from two threads at once, and in a forked process."""

import copy
import itertools
import multiprocessing
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.cases.allocator import watched_allocator
from tests.cases.fused_modules import MODULES, differences, make, step

RUNS = 50
WITHOUT_DROPOUT = [name for name, module in MODULES.items() if name != "dense block, min"]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", MODULES)
def test_fifty_runs_give_the_same_bits(name, threads):
    """What an operator reads before it wrote it is NaN, and so is what it reads after it gave it back."""
    module, x = make(name)
    state = copy.deepcopy(module.state_dict())
    first = step(module, x)
    assert all(value.isfinite().all() for value in first.values())
    with watched_allocator(poison=True):
        for _ in range(RUNS):
            module.load_state_dict(state)
            assert differences(step(module, x), first) == []


def at_once(*calls: Callable[[], None]) -> None:
    """Calls all of them at the same time; raises what the first of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], None]) -> None:
        try:
            start.wait()
            call()
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=run, args=[call]) for call in calls]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


def train(module: torch.nn.Module, x: Tensor) -> list[dict[str, Tensor]]:
    return [step(module, x) for _ in range(10)]


# The masks of dropout come from the one generator that all threads share.
@pytest.mark.parametrize("names", list(itertools.pairwise(WITHOUT_DROPOUT)), ids=" and ".join)
def test_two_threads_train_two_modules_at_once(names, threads):
    expected = [train(*make(name)) for name in names]
    made: list[list[dict[str, Tensor]]] = [[], []]
    modules = [make(name) for name in names]

    def run(at: int) -> Callable[[], None]:
        return lambda: made[at].extend(train(*modules[at]))

    at_once(run(0), run(1))
    for ours, wanted in zip(made, expected, strict=True):
        assert [differences(a, b) for a, b in zip(ours, wanted, strict=True)] == [[]] * 10


@pytest.mark.parametrize("name", MODULES)
def test_two_threads_share_one_module_in_evaluation(name, threads):
    module, x = make(name)
    module.eval()
    inputs = [x, x.flip(2)]
    expected = [step(module, x) for x in inputs]
    made: list[list[dict[str, Tensor]]] = [[], []]

    def run(at: int) -> Callable[[], None]:
        return lambda: made[at].extend(step(module, inputs[at]) for _ in range(10))

    at_once(run(0), run(1))
    for results, wanted in zip(made, expected, strict=True):
        assert [differences(result, wanted) for result in results] == [[]] * 10


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_trains_with_one_thread(threads):
    """One, as torch asks for: its own operators wait for ever, too, where a child wants the parent's other threads."""
    modules = {name: make(name) for name in MODULES}
    for module, x in modules.values():
        step(module, x)  # so that the parent has its threads
    torch.set_num_threads(1)
    expected = {name: step(*copy.deepcopy(pair)) for name, pair in modules.items()}
    torch.set_num_threads(threads)

    def train() -> None:
        torch.set_num_threads(1)
        for name, (module, x) in modules.items():
            assert differences(step(module, x), expected[name]) == [], name

    child = multiprocessing.get_context("fork").Process(target=train)
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode == 0

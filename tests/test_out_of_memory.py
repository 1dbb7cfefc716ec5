# SPDX-License-Identifier: Apache-2.0
"""Memory that runs out in the middle of a step: every allocation in turn fails."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.cases.allocator import PLANTED, Watch, watched_allocator
from tests.cases.converted import pair
from tests.cases.fused_modules import MODULES, differences, make, step

pytestmark = pytest.mark.usefixtures("one_thread")


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def count_allocations(module: nn.Module, x: Tensor, watch: Watch) -> int:
    watch.fail_at(0)
    step(module, x)
    return watch.allocations()


def failing_step(module: nn.Module, x: Tensor, watch: Watch, number: int) -> tuple[str, dict[str, Tensor]]:
    """Which pass the planted failure ended; or "" and the results where torch knew another way, as its convolutions."""
    passes = ["forward"]
    watch.fail_at(number)
    try:
        return "", step(module, x, lambda: passes.append("backward"))
    except RuntimeError as error:
        assert PLANTED in str(error)
        return passes[-1], {}
    finally:
        watch.fail_at(0)


@pytest.mark.parametrize("name", MODULES)
def test_every_allocation_of_a_step_may_fail(name):
    """A step that fails leaves nothing behind but the statistics of a completed forward pass, and the next step is as
    if it had not been. Fresh memory is NaN, so that nothing half-written passes for a result."""
    module, x = make(name)
    before = state_of(module)
    with watched_allocator(poison=True) as watch:
        clean = step(module, x)
        states = {"forward": before, "backward": state_of(module)}
        failed = set()
        in_use = watch.bytes_in_use()
        for number in range(1, count_allocations(module, x, watch) + 1):
            module.load_state_dict(before)
            stopped, made = failing_step(module, x, watch, number)
            failed.add(stopped)
            if stopped:
                assert differences(state_of(module), states[stopped]) == [], f"allocation {number}"
                assert watch.bytes_in_use() == in_use, f"a leak at allocation {number}"
                module.load_state_dict(before)
                made = step(module, x)
            assert differences(made, clean) == [], f"allocation {number}"
            made.clear()
    assert failed >= {"forward", "backward"}


@pytest.mark.parametrize("memory", ["balanced", "min"])
def test_training_goes_on_after_a_failure(memory):
    """As with plain modules, a network's first norms have counted a batch that fails later on."""
    _, net = pair(memory=memory, drop_rate=0.2)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    parameters = state_of(net)

    def train(net: nn.Module) -> dict[str, Tensor]:
        made = step(net, x)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter -= 0.1 * made[name]
        return {name: value for name, value in state_of(net).items() if name in made} | {"out": made["out"]}

    clean = train(copy.deepcopy(net))
    with watched_allocator(poison=True) as watch:
        total = count_allocations(copy.deepcopy(net), x, watch)
        for number in range(1, total, total // 12):
            failed = copy.deepcopy(net)
            stopped, _ = failing_step(failed, x, watch, number)
            if stopped:
                for name, parameter in failed.named_parameters():
                    assert torch.equal(parameter, parameters[name])
                assert differences(train(failed), clean) == []

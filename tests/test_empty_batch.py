# SPDX-License-Identifier: Apache-2.0
"""A batch of nothing passes through a network in training as through a plain one: it counts, and moves nothing."""

import pytest
import torch
from torch import Tensor, nn

from fastdense.ops import update_running_stats_
from tests.cases.families import MODES, pair


def made_by_a_step(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x[:0].requires_grad_()
    out = net(x)
    out.sum().backward()
    parameters = {f"gradient of {name}": p.grad for name, p in net.named_parameters()}
    return {"out": out, "gradient of input": x.grad} | parameters | dict(net.named_buffers())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name, memory", MODES)
def test_a_step(name, memory, training):
    plain, fast, x = pair(name, memory)
    expected, found = (made_by_a_step(net.train(training), x) for net in (plain, fast))
    assert expected.keys() == found.keys()
    for key, wanted in expected.items():
        assert torch.equal(found[key], wanted), key


@pytest.mark.parametrize("name, memory", MODES)
def test_the_next_step_is_as_if_there_had_been_none(name, memory):
    plain, fast, x = pair(name, memory)
    for net in (plain, fast):
        made_by_a_step(net, x)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-9, atol=1e-9)


def test_running_statistics_of_no_values():
    mean, var, tracked = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor(5)
    update_running_stats_([mean], [var], [tracked], torch.zeros(2), torch.zeros(2), [0], [0.1], 0)
    assert (mean.tolist(), var.tolist(), tracked.item()) == ([1.0, 2.0], [3.0, 4.0], 6)
    with pytest.raises(ValueError, match="count to be more than 1 value per channel, got 1"):
        update_running_stats_([mean], [var], [tracked], torch.zeros(2), torch.zeros(2), [0], [0.1], 1)
    assert tracked.item() == 6

# SPDX-License-Identifier: Apache-2.0
"""Frozen stages of dual path blocks; tests/test_freeze.py has what all frozen networks have in common."""

import copy

import pytest
import torch
from torch import nn

import fastdense
from tests.cases.frozen import CHANGES, check_change_is_seen, dual_path, made, own_dual_path, relative, same


def _replace_a_convolution(net: nn.Module) -> None:
    net.features.conv3_2.c1x1_c.conv = copy.deepcopy(net.features.conv3_2.c1x1_c.conv)
    with torch.no_grad():
        net.features.conv3_2.c1x1_c.conv.weight.mul_(1.5)


@torch.no_grad()
def _write_a_statistic(net: nn.Module) -> None:
    net.features.conv4_2.c3x3_b.bn.running_var.mul_(3)


@torch.no_grad()
def _write_a_grouped_weight(net: nn.Module) -> None:
    net.features.conv2_2.c3x3_b.conv.weight.add_(0.5)


THAWS = CHANGES | {
    "a running statistic": _write_a_statistic,
    "a grouped weight": _write_a_grouped_weight,
    "another convolution": _replace_a_convolution,
}


@pytest.mark.parametrize("change", THAWS)
def test_a_change_is_seen_at_the_next_call(change):
    check_change_is_seen("dual path", THAWS[change])


def test_frozen_stages_give_the_same_bits():
    _, fast, x = made("dual path")
    with torch.no_grad():
        frozen = fast(x)
        assert torch.equal(frozen, fastdense.thaw(fast)(x))


def test_a_stage_of_which_one_block_trains_is_not_used():
    plain, fast, x = made("dual path")
    for net in (plain, fast):
        net.features.conv3_2.train()
    same(plain, fast, x)
    for a, b in zip(fast.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for net in (plain, fast):
        net.eval()
    same(plain, fast, x)


def test_blocks_of_a_stage_run_alone_use_their_own_weights():
    """The first block keeps the weights of its stage: called alone, it is another one."""
    plain, fast, _ = made("dual path")
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        assert relative(fast.features.conv2_1(x), plain.features.conv2_1(x)) <= 1e-10


@pytest.mark.filterwarnings("ignore:fastdense. .* runs as plain modules")
def test_hooks_in_a_frozen_stage_are_called():
    plain, fast, x = made("dual path")
    seen = []
    fast.features.conv3_2.c1x1_a.register_forward_hook(lambda *_: seen.append(1))
    same(plain, fast, x)
    assert seen == [1]


@pytest.mark.parametrize("net", [dual_path(b=True), own_dual_path(survival=0.5)], ids=["joined", "depth"])
def test_stages_that_are_planned_in_each_call_are_refused(net):
    with pytest.raises(ValueError, match="stochastic depth or two last convolutions, as in dpn68b, are not packed"):
        fastdense.freeze(fastdense.convert(net).eval())

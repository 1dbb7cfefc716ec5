# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth: the decay, the conventions, and what a dropped branch leaves alone."""

import itertools
import math

import pytest
import torch
from torch import nn

from fastdense.nn import StochasticDepth, linear_decay

CONVENTIONS = list(itertools.product(("batch", "sample"), ("test", "train")))


class Counted(nn.Module):
    """A branch that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.norm(x)


def test_decay_of_the_published_network():
    probabilities = linear_decay(54, 0.5)
    assert len(probabilities) == 54
    assert probabilities[0] == pytest.approx(0.990741, abs=5e-7)
    assert probabilities[-1] == 0.5
    assert sum(probabilities) == pytest.approx(40.25)
    steps = [a - b for a, b in itertools.pairwise(probabilities)]
    assert steps == pytest.approx([0.5 / 54] * 53)


def test_decay_to_one_is_constant():
    assert linear_decay(7, 1.0) == [1.0] * 7


@pytest.mark.parametrize(("mode", "scale"), CONVENTIONS)
def test_survival_one_is_a_plain_sum(mode, scale):
    x = torch.randn(4, 3)
    before = torch.get_rng_state()
    for training in (True, False):
        drop = StochasticDepth(1.0, mode, scale).train(training)
        assert torch.equal(drop(torch.sin, x, x), x + torch.sin(x))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("mode", "scale"), CONVENTIONS)
def test_survival_zero_is_the_shortcut(mode, scale):
    x = torch.randn(4, 3)
    assert torch.equal(StochasticDepth(0.0, mode, scale)(torch.sin, x, x), x)


@pytest.mark.parametrize(("mode", "scale"), CONVENTIONS)
def test_factors_of_each_convention(mode, scale):
    p = 0.25
    drop = StochasticDepth(p, mode, scale)
    zero, one = torch.zeros(1000, 2), torch.ones(1000, 2)
    kept = 1 / p if scale == "train" else 1.0
    outputs = [drop(torch.ones_like, zero, zero) for _ in range(100)]
    for y in outputs:
        assert torch.equal(y[:, 0], y[:, 1])
        assert set(y.unique().tolist()) <= {0.0, kept}
    mixed = [y.unique().numel() == 2 for y in outputs]
    assert mixed == [mode == "sample"] * 100
    rows = torch.stack(outputs)[:, :, 0] != 0
    draws = rows[:, 0] if mode == "batch" else rows.flatten()
    sigma = math.sqrt(p * (1 - p) / draws.numel())
    assert abs(draws.double().mean().item() - p) < 5 * sigma
    expected = one * (p if scale == "test" else 1.0)
    assert torch.equal(drop.eval()(torch.ones_like, zero, zero), expected)


@pytest.mark.parametrize(("mode", "scale"), CONVENTIONS)
def test_all_gates_of_a_linear_chain_average_to_its_evaluation(mode, scale, monkeypatch):
    """Exact enumeration: gates of three linear branches, each outcome weighted by its probability."""
    chain = [(StochasticDepth(p, mode, scale), slope) for p, slope in ((0.9, 0.3), (0.6, -1.7), (0.5, 0.8))]
    x = torch.randn(1, 5, dtype=torch.float64)

    def run(x):
        for drop, slope in chain:
            x = drop(lambda v, slope=slope: slope * v, x, x)
        return x

    mean = torch.zeros_like(x)
    for gates in itertools.product((True, False), repeat=3):
        draws = iter(gates)
        monkeypatch.setattr(torch, "rand", lambda size, draws=draws, **_: torch.full(size, 0.0 if next(draws) else 1.0))
        weights = [drop.survival if gate else 1 - drop.survival for gate, (drop, _) in zip(gates, chain, strict=True)]
        mean += math.prod(weights) * run(x)
    for drop, _ in chain:
        drop.eval()
    torch.testing.assert_close(mean, run(x))


def test_a_dropped_branch_is_not_called():
    branch, drop = Counted(), StochasticDepth(0.0)
    x = torch.randn(4, 3, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = drop(branch, x, x)
    assert branch.calls == 0
    assert saved == []
    assert int(branch.norm.num_batches_tracked) == 0
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert branch.norm.weight.grad is None


def test_samples_are_dropped_one_by_one_in_gradients_too():
    drop = StochasticDepth(0.5, "sample", "train")
    x = torch.randn(64, 3, requires_grad=True)
    y = drop(lambda v: 3 * v, x, x)
    y.sum().backward()
    kept = ~torch.isclose(y, x).all(1)
    assert 0 < kept.sum() < 64
    assert torch.equal(x.grad[:, 0], torch.where(kept, 7.0, 1.0))


def test_a_seed_fixes_the_gates():
    x = torch.randn(8, 3)
    drop = StochasticDepth(0.5, "sample")
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(torch.stack([drop(torch.sin, x, x) for _ in range(8)]))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"survival": 1.5}, "survival to be a probability in [0, 1], got 1.5"),
        ({"survival": math.nan}, "survival to be a probability in [0, 1], got nan"),
        ({"survival": 0.5, "mode": "row"}, "mode to be one of ('batch', 'sample'), got 'row'"),
        ({"survival": 0.5, "scale": "none"}, "scale to be one of ('test', 'train'), got 'none'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError) as raised:
        StochasticDepth(**arguments)
    assert str(raised.value) == f"StochasticDepth: expected {message}"


def test_wrong_decay():
    with pytest.raises(ValueError, match="linear_decay: expected num_blocks to be positive, got 0"):
        linear_decay(0)
    with pytest.raises(ValueError, match="linear_decay: expected last to be a probability"):
        linear_decay(3, -0.1)

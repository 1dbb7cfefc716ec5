# SPDX-License-Identifier: Apache-2.0
"""FC-DenseNet: parameter counts, numbers against plain modules, bytes kept for backward, errors."""

import copy

import pytest
import torch
from torch import nn

import fastdense
from fastdense.models import create
from fastdense.models.fc_densenet import FCDenseNet
from tests.cases.converted import assert_same, fused_calls, randomise, step

pytestmark = pytest.mark.filterwarnings("error:fastdense")


def small(**options) -> nn.Module:
    options = {"num_classes": 3, "drop_rate": 0.0, "init_features": 6} | options
    return randomise(FCDenseNet(4, (2, 3), 2, (3, 2), **options).double())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("fc_densenet56", 1_375_019), ("fc_densenet67", 3_460_475), ("fc_densenet103", 9_318_075)],
)
def test_parameter_counts(name, parameters):
    with torch.device("meta"):
        model = create(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("size", [(16, 16), (13, 18)])
def test_same_numbers_as_plain_modules(size, mode):
    fast = getattr(small(), mode)()
    plain = fastdense.restore(copy.deepcopy(fast))
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == [(2, "none"), (3, "none"), (2, "none"), (3, "none"), (2, "none")]
    assert fused_calls(plain, x) == []


@pytest.mark.parametrize(
    ("norm", "act"), [("instance", "relu"), (("group", {"num_groups": 2}), ("leaky_relu", {"negative_slope": 0.1}))]
)
@pytest.mark.parametrize("memory", ["balanced", "min"])
def test_other_norms_and_activations_are_fused(norm, act, memory):
    fast = small(norm=norm, act=act, memory=memory)
    plain = fastdense.restore(copy.deepcopy(fast))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for mode in (True, False):
        assert_same(step(fast.train(mode), x), step(plain.train(mode), x))
    assert len(fused_calls(fast, x)) == 5
    assert {row.runs for row in fastdense.report(fast).rows} == {"fused"}


def test_only_new_features_are_enlarged():
    net = small()
    assert [conv.in_channels for conv in net.transitions_up] == [2 * 4, 3 * 4]
    skips = [6 + 2 * 4, 6 + 5 * 4]
    assert [block.denselayer1.norm1.num_features for block in net.up_blocks] == [8 + skips[1], 12 + skips[0]]


def test_blocks_keep_little():
    """The plain net keeps the normalised concatenation of every layer."""

    def kept(net: nn.Module) -> int:
        storages = {}
        pack = lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage()) and t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(torch.randn(1, 3, 64, 64))
        return sum(storage.nbytes() for storage in storages.values())

    fast = FCDenseNet(12, (4, 4), 4, (4, 4), drop_rate=0.0)
    plain = fastdense.restore(copy.deepcopy(fast))
    assert kept(fast) < 0.35 * kept(plain)


def test_errors():
    with pytest.raises(ValueError, match="norm to be one of batch, instance, group, got 'layer'"):
        small(norm="layer")
    with pytest.raises(ValueError, match="act to be one of relu"):
        small(act="step")
    with pytest.raises(ValueError, match="up_layers to have 2 entries like down_layers"):
        FCDenseNet(4, (2, 2), 2, (2,))
    with pytest.raises(ValueError, match="input to be at least 4 pixels wide and high"):
        small()(torch.zeros(2, 3, 3, 8, dtype=torch.float64))

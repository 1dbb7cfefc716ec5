# SPDX-License-Identifier: Apache-2.0
"""``FlopCounterMode`` counts converted models like plain ones, in both passes, while they run fused."""

import copy
import json
import subprocess
import sys
import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import fastdense
from fastdense.models import catalogue
from fastdense.models.fc_densenet import FCDenseNet
from tests.cases.operators import operators


def fc_densenet() -> nn.Module:
    return FCDenseNet(4, (2, 2), 2, (2, 2), num_classes=3)


def dpn() -> nn.Module:
    return timm.models.dpn.DPN((2, 2, 3, 2), (16,) * 4, k_r=32, groups=8, num_classes=7, small=True)


NETS = {
    "torchvision": (lambda: torchvision.models.DenseNet(8, (3, 4, 2, 2), 16, num_classes=7), (2, 3, 64, 64)),
    "dpn": (dpn, (2, 3, 64, 64)),
    "rrdbnet": (lambda: fastdense.models.create("rrdbnet", blocks=2), (2, 3, 12, 12)),
    "fc_densenet": (fc_densenet, (2, 3, 16, 16)),
}
MEMORY = [(name, memory) for name in NETS for memory in ("balanced", "min", "recompute")] + [("dpn", "reversible")]


def plain(name: str, device: str) -> tuple[nn.Module, torch.Tensor]:
    make, shape = NETS[name]
    with torch.device(device):
        return fastdense.restore(make()), torch.randn(shape)


def converted(net: nn.Module, memory: str) -> nn.Module:
    return fastdense.convert(copy.deepcopy(net), memory=memory)


def counts(net: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Of a forward and of a backward pass; a fall-back, which warns, fails."""
    with warnings.catch_warnings(), FlopCounterMode(display=False) as counter:
        warnings.simplefilter("error")
        out = net(x)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


def fused_calls(net: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        net(x)
    return sum("fastdense" in str(operator) for operator in counter.get_flop_counts()["Global"])


@pytest.mark.parametrize("name, memory", MEMORY)
def test_both_passes(name, memory):
    net, x = plain(name, "meta")
    expected = counts(net, x)
    fast = converted(net, memory)
    assert expected[0] > 0 and expected[1] > 0
    assert counts(fast, x) == expected
    assert fused_calls(fast, x) > 0


@pytest.mark.parametrize("name", NETS)
def test_what_needs_no_gradient_is_not_counted(name):
    net, x = plain(name, "meta")
    parameters = list(net.parameters())
    for frozen in (parameters[: len(parameters) // 2], parameters[1::3]):
        net.requires_grad_(True)
        for parameter in frozen:
            parameter.requires_grad_(False)
        assert counts(converted(net, "balanced"), x) == counts(net, x)
    x.requires_grad_(True)
    assert counts(converted(net, "balanced"), x) == counts(net, x)


def test_tensors_with_memory():
    net, x = plain("fc_densenet", "cpu")
    assert counts(converted(net, "min"), x) == counts(net, x)


def test_one_dense_block_by_hand():
    block = fastdense.nn.DenseBlock(2, 3, 4, bn_size=2)
    pixels, widths = 2 * 5 * 6, (3, 7)
    products = sum(width * 8 + 8 * 4 * 9 for width in widths)
    assert counts(block, torch.randn(2, 3, 5, 6, requires_grad=True)) == (2 * pixels * products, 4 * pixels * products)


def test_every_operator_has_a_formula():
    assert {getattr(torch.ops.fastdense, name) for name in operators()} <= set(flop_counter.flop_registry)


FASTDENSE_FIRST = """
import sys, fastdense
assert "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules
import torch.utils.flop_counter
"""
COUNTER_FIRST = "import torch.utils.flop_counter, fastdense"


@pytest.mark.parametrize("imports", [FASTDENSE_FIRST, COUNTER_FIRST])
def test_formulas_are_there_whoever_is_imported_first(imports):
    check = "assert torch.ops.fastdense.dense_block in torch.utils.flop_counter.flop_registry"
    subprocess.run([sys.executable, "-c", f"{imports}\n{check}"], check=True)


@pytest.mark.parametrize("name", ["densenet_cifar", "dpn68", "fc_densenet56", "rrdbnet", "srdensenet"])
def test_the_catalogue_counts_the_same(name):
    with torch.device("meta"):
        model = fastdense.models.create(name)
        x = torch.empty(1, *catalogue.CATALOGUE[name].shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    counted = json.loads(catalogue.FILE.read_text())[name]  # of plain modules; tests/test_cli.py counts again
    assert counted["macs"] == counter.get_total_flops() // 2

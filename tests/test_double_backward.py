# SPDX-License-Identifier: Apache-2.0
"""Gradients of gradients raise an error, whatever they are asked of: none is left out in silence."""

import pytest
import timm.models.dpn as timm_dpn
import torch
import torchvision.models.densenet as tv_densenet
from torch import Tensor, nn

import fastdense
from fastdense.nn import ResidualDenseBlock
from fastdense.nn.sr_dense_block import SRDenseBlock
from tests.cases.any_layers import Block
from tests.cases.converted import MEMORY, pair, randomise, torchvision_net

pytestmark = pytest.mark.usefixtures("one_thread")

C0 = 6


def dual_path() -> nn.Module:
    options = {"groups": 2, "block_type": "normal"}
    first = timm_dpn.DualPathBlock(C0, 8, 8, 8, 4, **options | {"block_type": "proj"})
    return nn.Sequential(first, timm_dpn.DualPathBlock(8 + 3 * 4, 8, 8, 8, 4, **options))


def gelu_dual_path() -> nn.Module:
    model = dual_path()
    for module in model.modules():
        if hasattr(module, "act"):
            module.act = nn.GELU()
    return model


KINDS = {
    "dense block": lambda: tv_densenet._DenseBlock(2, C0, 2, 4, 0.0),
    "with a transition": lambda: nn.Sequential(
        tv_densenet._DenseBlock(2, C0, 2, 4, 0.0), tv_densenet._Transition(C0 + 8, 5)
    ),
    "with a stem": lambda: nn.Sequential(
        nn.Conv2d(C0, 4, 7, stride=2, padding=3, bias=False),
        *list(torchvision_net(num_init_features=4).features.children())[1:5],
    ),
    "residual": lambda: nn.Sequential(ResidualDenseBlock(C0, 4, 3)),
    "growing": lambda: nn.Sequential(SRDenseBlock(C0, 4, 3)),
    "dual path": dual_path,
    "layers on a shared buffer": Block,
    "dual path on a shared buffer": gelu_dual_path,
}


def gradients(model: nn.Module, x: Tensor, of: str) -> tuple[Tensor, list[Tensor]]:
    """Of a sum, whose own gradient is a constant; and what they depend on."""
    x = x.clone().requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    weights = torch.linspace(-1, 1, 1000, dtype=x.dtype)
    out = model(x).flatten()[:1000]
    asked = [x] if of == "input" else leaves[1:]
    grads = torch.autograd.grad(out @ weights[: len(out)], asked, create_graph=True)
    return torch.cat([grad.flatten() for grad in grads]).square().sum(), leaves


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("of", ["input", "parameters", "input, frozen parameters"])
@pytest.mark.parametrize("kind", KINDS)
def test_asked_of_any_leaf_alone(kind, of, memory):
    shared = "shared buffer" in kind
    if shared and memory == "balanced":
        return  # of plain modules, which have them
    plain, fast = pair(lambda: randomise(KINDS[kind]().double()), memory)
    assert ("shared buffer" in {row.runs for row in fastdense.report(fast).rows}) == shared
    plain = fastdense.restore(plain)
    x = torch.randn(2, C0, 12, 12, dtype=torch.float64)
    refused = 0
    for mode in (True, False):
        totals, leaves = [], []
        for net in (plain, fast):
            net.train(mode).requires_grad_("frozen" not in of)
            total, inputs = gradients(net, x, of.partition(",")[0])
            totals.append(total)
            leaves.append(inputs)
        for expected, leaf in zip(*leaves, strict=True):
            if _is_zero(totals[0], expected):
                continue
            refused += 1
            with pytest.raises(RuntimeError, match=r"double backward is not supported; call fastdense.restore"):
                torch.autograd.grad(totals[1], leaf, retain_graph=True, allow_unused=True)
    assert refused > 0 or (kind in ("residual", "growing") and "frozen" in of)  # of their ReLUs nothing is left


def _is_zero(total: Tensor, leaf: Tensor) -> bool:
    """Whether a gradient of plain modules is zero."""
    if not total.requires_grad:
        return True
    (grad,) = torch.autograd.grad(total, leaf, retain_graph=True, allow_unused=True)
    return grad is None or not grad.any()

# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of converted models in plain torchvision, timm and MONAI, and back: the same bits."""

import copy

import pytest
import torch
from torch import nn

import fastdense
from tests.cases.converted import assert_bit_equal, assert_same, fused_calls, step, timm_net, torchvision_net
from tests.cases.monai import monai_net

pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]

NETS = {
    "torchvision": (torchvision_net, (2, 3, 64, 64)),
    "timm": (timm_net, (2, 3, 64, 64)),
    "monai": (lambda: monai_net(2), (2, 1, 48, 40)),
}
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    # A large eps: else it divides the rounding of gradients that vanish by itself.
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, eps=0.01),
}


class Training:
    """A net with its optimizer."""

    def __init__(self, model: nn.Module, optimizer: str) -> None:
        self.model = model
        self.optimizer = OPTIMIZERS[optimizer](model.parameters())

    def step(self, x: torch.Tensor) -> None:
        step(self.model.train(), x)
        self.optimizer.step()

    def save(self, path) -> None:
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, path)

    def load(self, path) -> None:
        checkpoint = torch.load(path, weights_only=True)
        self.model.load_state_dict(checkpoint["model"], strict=True)
        self.optimizer.load_state_dict(checkpoint["optimizer"])

    def moments(self) -> dict[str, torch.Tensor]:
        """The optimizer's state by parameter and name."""
        state = self.optimizer.state_dict()["state"]
        return {f"{at} {name}": value for at, of_one in state.items() for name, value in of_one.items()}


def outputs(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """In eval mode, of the plain modules."""
    with torch.no_grad():
        return {"out": fastdense.restore(copy.deepcopy(model)).eval()(x)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("source", ["converted", "plain"])
@pytest.mark.parametrize("name", NETS)
def test_checkpoints_go_both_ways(name, source, optimizer, tmp_path):
    make, shape = NETS[name]
    images = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    fast, plain = Training(fastdense.convert(make()), optimizer), Training(make(), optimizer)
    assert fused_calls(fast.model, images[0]) and not fused_calls(plain.model, images[0])
    trained, fresh = (fast, plain) if source == "converted" else (plain, fast)
    trained.step(images[0])
    trained.save(tmp_path / "checkpoint.pt")
    fresh.load(tmp_path / "checkpoint.pt")

    assert_bit_equal(fresh.model.state_dict(), trained.model.state_dict())
    assert trained.moments() and all(value.norm() > 0 for value in trained.moments().values())
    assert_bit_equal(fresh.moments(), trained.moments())
    assert_bit_equal(outputs(fresh.model, images[1]), outputs(trained.model, images[1]))

    for training in (fast, plain):
        training.step(images[2])
    assert_same(fast.model.state_dict(), plain.model.state_dict())
    assert_same(fast.moments(), plain.moments())

    fast.save(tmp_path / "checkpoint.pt")
    restored = Training(fastdense.restore(fast.model), optimizer)
    restored.load(tmp_path / "checkpoint.pt")
    plain.load(tmp_path / "checkpoint.pt")
    for training in (restored, plain):
        training.step(images[1])
    assert_bit_equal(restored.model.state_dict(), plain.model.state_dict())
    assert_bit_equal(restored.moments(), plain.moments())

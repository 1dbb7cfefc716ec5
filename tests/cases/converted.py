# SPDX-License-Identifier: Apache-2.0
"""Pairs of a plain and a converted network, and what the tests of conversion compare."""

import contextlib
import warnings

import timm.models.densenet as timm_densenet
import torch
import torch._dynamo.testing
import torchvision.models.densenet as tv_densenet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdense

MEMORY = ("balanced", "min", "recompute")
FUSED = [(2, "transition"), (3, "norm")]  # operator calls of the small torchvision net: layers and what reads them
BLOCK, TRANSITION = "features.denseblock1", "features.transition1"


def torchvision_net(**options) -> nn.Module:
    sizes = {"growth_rate": 6, "block_config": (2, 3), "num_init_features": 8, "num_classes": 5}
    return randomise(tv_densenet.DenseNet(**sizes | options).double())


def timm_net(**options) -> nn.Module:
    sizes = {"growth_rate": 6, "block_config": (2, 3), "num_classes": 5}
    return randomise(timm_densenet.DenseNet(**sizes | options).double())


NETS = {"torchvision": torchvision_net, "timm": timm_net}


def randomise(net: nn.Module) -> nn.Module:
    """Norms as after some training, so that scale, shift and running statistics matter."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
            if module.running_mean is not None:
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
    return net


def pair(make=torchvision_net, memory="balanced", change=None, when="before", **options):
    """A plain net and a converted one with the same numbers. `change` edits both, before or after the conversion."""
    nets = []
    for convert in (False, True):
        torch.manual_seed(0)
        net = make(**options)
        if change and when == "before":
            change(net)
        if convert:
            assert fastdense.convert(net, memory=memory) is net
        if change and when == "after":
            change(net)
        nets.append(net)
    return nets


def images(batch: int = 2, size: int = 64) -> Tensor:
    """64 pixels and more a channel in the last block: fewer make batch norm ill-conditioned."""
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def step(net: nn.Module, x: Tensor, run=None, names=None, zero: bool = True) -> dict[str, Tensor]:
    """All that a forward and a backward pass make: output, gradients, buffers."""
    x = x.detach().requires_grad_()
    if zero:
        net.zero_grad()
    out = net(x) if run is None else run(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    made = {"out": out.detach(), "input": x.grad}
    made |= {f"grad {name}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return made | {f"buffer {name}": b.clone() for name, b in net.named_buffers()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Relative errors, those of gradients never against less than 1e-4 of the largest gradient.

    Some gradients vanish, as that of a convolution's bias in front of a batch norm, and what is left is rounding.
    """
    assert actual.keys() == expected.keys()
    floor = 1e-4 * max((grad.double().norm() for name, grad in expected.items() if name.startswith("grad")), default=0)
    for name, value in actual.items():
        wanted = expected[name].double()
        assert value.dtype == expected[name].dtype, name
        scale = max(wanted.norm(), floor if name.startswith("grad") else 0, 1e-30)
        assert (value.double() - wanted).norm() <= tolerance * scale, name


def assert_bit_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


class Calls(TorchDispatchMode):
    """Lists the calls of the fused operator as (number of layers, tail), and the elements of z that each keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, str]] = []
        self.kept: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.fastdense.dense_block.default:
            self.made.append((args[3], args[5]))
            self.kept.append(result[4].numel())
        return result


def fused_calls(net: nn.Module, x: Tensor) -> list[tuple[int, str]]:
    with Calls() as calls:
        net(x)
    return calls.made


@contextlib.contextmanager
def fastdense_warnings():
    """Collects the package's warnings."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(w.message) for w in caught if str(w.message).startswith("fastdense")]


@contextlib.contextmanager
def one_warning(*parts: str):
    with fastdense_warnings() as messages:
        yield
    assert len(messages) == 1, messages
    assert all(part in messages[0] for part in parts), messages


def first_layer(net: nn.Module) -> nn.Module:
    return net.features.denseblock1.denselayer1


def norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]

# SPDX-License-Identifier: Apache-2.0
"""Residual networks: counts, the shortcut, both orders of a block, stochastic depth inside."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdense import models
from fastdense.models.resnet import ResidualBlock, Shortcut
from fastdense.nn import StochasticDepth
from tests.cases.random_norms import random_norms


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet_cifar", "preresnet_cifar"])
@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962), (1202, 19_421_274)],
)
def test_published_parameter_counts(name, depth, parameters):
    with torch.device("meta"):
        assert count(models.create(name, depth=depth)) == parameters


def test_the_authors_network_of_stochastic_depth():
    with torch.device("meta"):
        model = models.create("stochastic_depth_cifar")
    assert count(model) == 1_732_010
    drops = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    assert len(drops) == 54
    assert drops[0].survival == pytest.approx(0.990741, abs=5e-7)
    assert drops[-1].survival == 0.5
    assert {(drop.mode, drop.scale) for drop in drops} == {("batch", "test")}
    assert {module.kind for module in model.modules() if isinstance(module, Shortcut)} == {"average"}


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_shortcut_by_hand(size):
    x = torch.randn(2, 3, *size)
    subsampled = Shortcut(3, 5, 2)(x)
    averaged = Shortcut(3, 5, 2, "average")(x)
    assert subsampled.shape == averaged.shape == (2, 5, (size[0] + 1) // 2, (size[1] + 1) // 2)
    assert torch.equal(subsampled[:, :3], x[..., ::2, ::2])
    assert not subsampled[:, 3:].any()
    assert not averaged[:, 3:].any()
    torch.testing.assert_close(averaged[:, :3, 1, 1], x[:, :3, 2:4, 2:4].mean((2, 3)))
    last = x[:, :, 2 * averaged.shape[2] - 2 :, 2 * averaged.shape[3] - 2 :]
    torch.testing.assert_close(averaged[:, :3, -1, -1], last.mean((2, 3)))
    assert Shortcut(3, 3)(x) is x


def test_images_are_halved_by_the_first_blocks_of_later_stages():
    model, shapes = models.resnet_cifar(20), []
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            module.register_forward_hook(lambda _, x, y: shapes.append(tuple(y.shape[1:3])))
            assert module.conv2.stride == (1, 1)
    model(torch.randn(2, 3, 32, 32))
    assert shapes == [(16, 32)] * 3 + [(32, 16)] * 3 + [(64, 8)] * 3


@pytest.mark.parametrize("pre_activation", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_block_is_its_equation(pre_activation, stride):
    block = random_norms(ResidualBlock(4, 6, stride, pre_activation=pre_activation).double()).eval()
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)

    def norm(bn, x):
        shape = (1, -1, 1, 1)
        scale = bn.weight / (bn.running_var + 1e-5).sqrt()
        return (x - bn.running_mean.view(shape)) * scale.view(shape) + bn.bias.view(shape)

    y, identity = x, F.pad(x[..., ::stride, ::stride], (0, 0, 0, 0, 0, 2))
    if pre_activation:
        y = F.conv2d(norm(block.bn1, y).relu(), block.conv1.weight, stride=stride, padding=1)
        y = F.conv2d(norm(block.bn2, y).relu(), block.conv2.weight, padding=1)
        expected = identity + y
    else:
        y = norm(block.bn1, F.conv2d(y, block.conv1.weight, stride=stride, padding=1)).relu()
        y = norm(block.bn2, F.conv2d(y, block.conv2.weight, padding=1))
        expected = (identity + y).relu()
    torch.testing.assert_close(block(x), expected)


def test_pre_activation_chain_is_its_first_input_plus_all_branches():
    blocks = [random_norms(ResidualBlock(4, 4, pre_activation=True).double()).eval() for _ in range(4)]
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    states = [x]
    for block in blocks:
        states.append(block(states[-1]))
    total = x + sum(block.branch(state) for block, state in zip(blocks, states, strict=False))
    torch.testing.assert_close(states[-1], total)


@pytest.mark.parametrize(("mode", "scale"), [("batch", "test"), ("batch", "train"), ("sample", "train")])
def test_certain_survival_is_the_plain_network(mode, scale):
    plain = models.resnet_cifar(14)
    other = models.resnet_cifar(14, survival=1.0, mode=mode, scale=scale)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(other(x), plain(x))


def test_all_dropped_leaves_the_shortcut_path():
    model = models.resnet_cifar(14)
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.survival = 0.0
    before = copy.deepcopy({name: b for name, b in model.named_buffers() if name.startswith("layer")})
    called = []
    for name, module in model.named_modules():
        if name.startswith("layer") and isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(lambda *_: called.append(1))
    x = torch.randn(2, 3, 16, 16)
    made = model(x)
    made.sum().backward()
    stem = F.relu(F.batch_norm(model.conv1(x), None, None, model.bn1.weight, model.bn1.bias, True))
    pooled = F.pad(stem[:, :, ::4, ::4].mean((2, 3)), (0, 48))
    torch.testing.assert_close(made, model.fc(pooled))
    assert not called
    for name, buffer in model.named_buffers():
        if name in before:
            assert torch.equal(buffer, before[name]), name
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("layer"), name


def test_blocks_that_are_dropped_keep_nothing_for_backward():
    model = models.resnet_cifar(20, pre_activation=True)

    def saved_bytes(survival):
        for module in model.modules():
            if isinstance(module, StochasticDepth):
                module.survival = survival
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
        ):
            out = model(torch.randn(2, 3, 32, 32))
        del out
        return sum(kept.values())

    everything, stem = saved_bytes(1.0), saved_bytes(0.0)
    assert stem < everything / 5


@pytest.mark.parametrize("name", ["resnet_cifar", "preresnet_cifar", "stochastic_depth_cifar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_and_reloads(name, dtype):
    model = models.create(name, depth=14, num_classes=7).to(dtype)
    x = torch.randn(3, 3, 17, 16, dtype=dtype)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    before = model.fc.weight.detach().clone()
    loss = F.cross_entropy(model(x).float(), torch.tensor([0, 3, 6]))
    loss.backward()
    optimiser.step()
    assert loss.isfinite()
    assert not torch.equal(model.fc.weight, before)
    copied = models.create(name, depth=14, num_classes=7).to(dtype)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied.eval()(x), model.eval()(x))


def test_compiles_as_one_graph():
    model = models.stochastic_depth_cifar(8).eval()
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    training = models.resnet_cifar(8)
    expected = copy.deepcopy(training)(x)
    torch.testing.assert_close(torch.compile(training, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 21}, "ResNet: expected depth to be 2 plus a positive multiple of 6, got 21"),
        ({"depth": 2}, "ResNet: expected depth to be 2 plus a positive multiple of 6, got 2"),
        ({"shortcut": "conv"}, r"Shortcut: expected kind to be one of .*, got 'conv'"),
        ({"survival": -1}, "linear_decay: expected last to be a probability"),
        ({"mode": "row"}, "StochasticDepth: expected mode to be one of"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.resnet_cifar(**{"depth": 20, **arguments})


def test_a_shortcut_cannot_lose_channels():
    with pytest.raises(ValueError, match="expected out_channels to be at least 4, got 3"):
        Shortcut(4, 3)

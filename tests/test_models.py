# SPDX-License-Identifier: Apache-2.0
"""Model definitions: published parameter counts, torchvision's keys and numbers, the registry."""

import copy
import io
import re

import monai.networks.nets.densenet as monai_densenet
import pytest
import torch
import torchvision
from torch import nn

import fastdense
from fastdense import models


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("densenet121", {}, 7_978_856),
        ("densenet161", {}, 28_681_000),
        ("densenet169", {}, 14_149_480),
        ("densenet201", {}, 20_013_928),
        ("densenet264", {}, 33_337_704),
        ("densenet264", {"growth_rate": 48}, 72_686_632),
        ("densenet_cifar", {"depth": 100, "growth_rate": 12}, 769_162),
        ("densenet_cifar", {"depth": 100, "growth_rate": 12, "num_classes": 100}, 800_032),
        ("densenet_cifar", {"depth": 250, "growth_rate": 24}, 15_324_406),
        ("densenet_cifar", {"depth": 190, "growth_rate": 40}, 25_624_430),
        ("densenet_cifar", {"depth": 40, "growth_rate": 12, "bottleneck": False, "compression": 1.0}, 1_019_722),
        ("densenet_cifar", {"depth": 100, "growth_rate": 24, "bottleneck": False, "compression": 1.0}, 27_249_082),
    ],
)
def test_published_parameter_counts(name, arguments, parameters):
    with torch.device("meta"):
        model = models.create(name, **arguments)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_torchvision_checkpoints_load_strictly(name):
    theirs = torchvision.models.get_model(name, weights=None, num_classes=7)
    ours = models.create(name, num_classes=7)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_same_numbers_as_torchvision():
    theirs = torchvision.models.densenet121(num_classes=10).double()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # with 1 and 0 some gradients would vanish but for rounding
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
    ours = models.densenet121(num_classes=10).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 160, 160, dtype=torch.float64)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = gradients[name].grad
        assert (parameter.grad - expected).norm() <= 1e-10 * expected.norm(), name
    buffers = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        assert (buffer - buffers[name]).double().norm() <= 1e-10 * buffers[name].double().norm(), name
    with torch.no_grad():
        expected = theirs.eval()(x)
        assert (ours.eval()(x) - expected).norm() <= 1e-10 * expected.norm()


def test_memory_modes_are_those_of_dense_blocks():
    for name in models.list():
        with torch.device("meta"):
            model = models.create(name)
        blocks = [module for module in model.modules() if isinstance(module, fastdense.nn.DenseBlock)]
        assert models.has_memory_modes(name) == bool(blocks), name


def test_registry():
    assert "densenet121" in models.list()
    assert models.list() == sorted(models.list())
    with pytest.raises(ValueError, match=r"expected name to be one of .*densenet121.*, got 'resnet50'"):
        models.create("resnet50")


@pytest.mark.parametrize("depth", [3, 4, 41])
def test_impossible_depths(depth):
    with pytest.raises(ValueError, match="4 plus a multiple of 6"):
        models.densenet_cifar(depth)


def test_memory_mode_reaches_every_block():
    model = models.densenet_cifar(16, 4, memory="min")
    assert {block.memory for block in model.modules() if isinstance(block, fastdense.nn.DenseBlock)} == {"min"}
    with pytest.raises(ValueError, match="memory to be one of"):
        models.densenet_cifar(16, 4, memory="none")


def test_drop_rate_is_used_in_training_only():
    model = models.densenet_cifar(16, 4, drop_rate=0.5).eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(("name", "parameters"), [("densenet121", 11_244_674), ("densenet264", 40_251_266)])
def test_parameter_counts_in_three_dimensions(name, parameters):
    with torch.device("meta"):
        model = models.create(name, spatial_dims=3, image_channels=1, num_classes=2)
    assert sum(p.numel() for p in model.parameters()) == parameters


BLOCKS = {"growth_rate": 4, "block_config": (2, 2)}


def small_densenet(dims: int = 2, image_channels: int = 3) -> torch.nn.Module:
    return models.densenet._imagenet((2, 2), 4, 6, spatial_dims=dims, image_channels=image_channels, num_classes=5)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_monai_checkpoints(dims):
    theirs = monai_densenet.DenseNet(dims, 1, 5, init_features=6, **BLOCKS).double().eval()
    ours = small_densenet(dims, 1).double().eval()
    models.load_densenet(ours, theirs.state_dict())
    x = torch.randn(2, 1, *(40,) * dims, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-12)


DIALECTS = {
    "torchvision": lambda key: key,
    "DataParallel": lambda key: f"module.{key}",
    "before 2018": lambda key: re.sub(r"(norm|conv)([12])\.", r"\1.\2.", key),
    "gpleiss": lambda key: key.replace("norm5", "norm_final"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_of_checkpoints(dialect):
    theirs = torchvision.models.DenseNet(num_init_features=6, num_classes=5, **BLOCKS).eval()
    state = {DIALECTS[dialect](key): value for key, value in theirs.state_dict().items()}
    if dialect == "before 2018":
        state = {key: value for key, value in state.items() if "num_batches_tracked" not in key}
    ours = small_densenet().eval()
    models.load_densenet(ours, state)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("features.norm5.weight"), r"state_dict to have features\.norm5\.weight, got none"),
        (lambda s: s.update({"classifier.bias": torch.zeros(7)}), r"classifier\.bias to have shape \(5,\), got \(7,\)"),
        (lambda s: s.update({"head.weight": torch.zeros(1)}), r"the model's entries only, got head\.weight"),
        (lambda s: s.update({"module.classifier.bias": torch.zeros(5)}), r"to name classifier\.bias once"),
    ],
)
def test_checkpoints_that_do_not_fit_change_nothing(change, message):
    model = small_densenet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value + 1 for key, value in model.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        models.load_densenet(model, state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


SMALL = [
    pytest.param("fractalnet", {"columns": 2, "widths": (4, 6)}, (2, 3, 8, 8), id="fractalnet"),
    pytest.param("highway_cifar", {}, (2, 3, 8, 8), id="highway_cifar"),
    pytest.param("highway_mlp", {"depth": 10, "in_features": 12}, (2, 3, 2, 2), id="highway_mlp"),
    pytest.param("highway_mnist", {"width": 4}, (2, 1, 28, 28), id="highway_mnist"),
    pytest.param("preresnet_cifar", {"depth": 8}, (2, 3, 8, 8), id="preresnet_cifar"),
    pytest.param("resnet_cifar", {"depth": 8}, (2, 3, 8, 8), id="resnet_cifar"),
    pytest.param("resnet_in_resnet", {"width": 2}, (2, 3, 8, 8), id="resnet_in_resnet"),
    pytest.param("stochastic_depth_cifar", {"depth": 20}, (2, 3, 8, 8), id="stochastic_depth_cifar"),
]


@pytest.mark.parametrize(("name", "arguments", "shape"), SMALL)
def test_a_seed_fixes_weights_and_training(name, arguments, shape):
    x, outputs = torch.randn(shape), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = models.create(name, **arguments)
        outputs.append(torch.stack([model(x) for _ in range(3)]))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(("name", "arguments", "shape"), SMALL)
def test_copies_and_layouts_give_the_same_numbers(name, arguments, shape):
    model, x = models.create(name, **arguments).double().eval(), torch.randn(shape, dtype=torch.float64)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        torch.testing.assert_close(other(x), expected)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x), expected)


@pytest.mark.parametrize(("name", "arguments", "shape"), SMALL)
def test_autocast(name, arguments, shape):
    model, x = models.create(name, **arguments).eval(), torch.randn(shape)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        made = model(x)
    assert made.dtype == torch.bfloat16
    assert (made.float() - expected).norm() < 0.05 * expected.norm()
    made.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(("name", "arguments", "shape"), SMALL)
def test_gradients_of_whole_networks(name, arguments, shape):
    """Along one direction in all parameters, against a central difference, in evaluation."""
    model, x = models.create(name, **arguments).double().eval(), torch.randn(shape, dtype=torch.float64)
    weights = torch.randn(model(x).shape, dtype=torch.float64)
    parameters = list(model.parameters())
    for p in parameters:
        if p.dim() == 1:  # zeros would put whole channels on the edge of a ReLU
            nn.init.uniform_(p, 0.1, 0.5)
    directions = [torch.randn_like(p) for p in parameters]

    def loss(step):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += step * d
        value = (model(x) * weights).sum()
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p -= step * d
        return value

    grads = torch.autograd.grad((model(x) * weights).sum(), parameters)
    made = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    step = 1e-8
    expected = (loss(step) - loss(-step)) / (2 * step)
    torch.testing.assert_close(made, expected.detach(), rtol=1e-4, atol=1e-4)


def test_small_networks_are_all_that_have_no_dense_blocks():
    assert [case.values[0] for case in SMALL] == [name for name in models.list() if not models.has_memory_modes(name)]

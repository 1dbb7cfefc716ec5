# SPDX-License-Identifier: Apache-2.0
"""Model definitions: published parameter counts, torchvision's keys and numbers, the registry."""

import inspect
import re
import typing

import monai.networks.nets.densenet as monai_densenet
import pytest
import torch
import torchvision

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


def test_monai_s_words_are_understood():
    with torch.device("meta"):
        theirs = monai_densenet.DenseNet121(spatial_dims=3, in_channels=1, out_channels=2, dropout_prob=0.25)
        ours = models.densenet121(spatial_dims=3, in_channels=1, out_channels=2, dropout_prob=0.25)
    shapes = [[p.shape for p in model.parameters()] for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    rates = {layer.drop_rate for layer in ours.modules() if isinstance(layer, fastdense.plain.dense_block.DenseLayer)}
    assert rates == {0.25}
    with pytest.raises(
        ValueError, match="densenet169: expected num_classes or out_channels, MONAI's word for it, got bo"
    ):
        models.densenet169(num_classes=2, out_channels=2)


@pytest.mark.parametrize("name", models.list())
def test_arguments_of_a_model_s_function_are_those_of_its_class(name):
    """Those written out, and those of ``**options``, by name and type; weights are loaded by the function."""
    function = getattr(models, name)
    known = typing.get_type_hints(function)
    made = known.pop("return")
    assert issubclass(made, torch.nn.Module)
    options = typing.get_args(known.pop("options", None))
    given = known | (typing.get_type_hints(options[0]) if options else {})
    assert not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()) or options
    theirs = typing.get_type_hints(made.__init__)
    of_function = {"weights", "progress", "image_channels", *models.densenet._MONAI}
    apart = of_function if options else {"depth", "growth_rate", "drop_rates", "width"}
    for argument, kind in given.items():
        if argument not in apart:
            assert theirs[argument] == kind, argument


SMALL = {"growth_rate": 4, "block_config": (2, 2)}


def small_densenet(dims: int = 2, image_channels: int = 3) -> torch.nn.Module:
    options = {"spatial_dims": dims, "image_channels": image_channels, "num_classes": 5}
    return models.densenet._imagenet("small", (2, 2), 4, 6, options)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_monai_checkpoints(dims):
    theirs = monai_densenet.DenseNet(dims, 1, 5, init_features=6, **SMALL).double().eval()
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
    theirs = torchvision.models.DenseNet(num_init_features=6, num_classes=5, **SMALL).eval()
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
        (lambda s: s.pop("features.norm5.weight"), r"state_dict to have features\.norm5\.weight, but it is missing"),
        (lambda s: s.update({"classifier.bias": torch.zeros(7)}), r"classifier\.bias to have shape \(5,\), got \(7,\)"),
        (lambda s: s.update({"head.weight": torch.zeros(1)}), r"only entries of the model, got unknown head\.weight"),
        (
            lambda s: s.update({"module.classifier.bias": torch.zeros(5)}),
            r"one entry for classifier\.bias, got a second one",
        ),
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

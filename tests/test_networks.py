# SPDX-License-Identifier: Apache-2.0
"""What holds for every network without dense blocks."""

import copy
import io

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import fastdense
from fastdense import models
from fastdense.fusion.convert import find
from fastdense.models.catalogue import CATALOGUE, count_model

SMALL = [
    pytest.param("drcn", {"recursions": 3, "width": 4}, (2, 1, 6, 5), id="drcn"),
    pytest.param("edsr", {"scale": 3, "blocks": 2, "width": 4}, (2, 3, 6, 5), id="edsr"),
    pytest.param("edsr_baseline", {"scale": 2, "blocks": 2, "width": 4}, (2, 3, 6, 5), id="edsr_baseline"),
    pytest.param("fractalnet", {"columns": 2, "widths": (4, 6)}, (2, 3, 8, 8), id="fractalnet"),
    pytest.param("highway_cifar", {}, (2, 3, 8, 8), id="highway_cifar"),
    pytest.param("highway_mlp", {"depth": 10, "in_features": 12}, (2, 3, 2, 2), id="highway_mlp"),
    pytest.param("highway_mnist", {"width": 4}, (2, 1, 28, 28), id="highway_mnist"),
    pytest.param("preresnet_cifar", {"depth": 8}, (2, 3, 8, 8), id="preresnet_cifar"),
    pytest.param("rdn", {"blocks": 2, "layers": 2, "width": 6}, (2, 3, 6, 5), id="rdn"),
    pytest.param("resnet_cifar", {"depth": 8}, (2, 3, 8, 8), id="resnet_cifar"),
    pytest.param("resnet_in_resnet", {"width": 2}, (2, 3, 8, 8), id="resnet_in_resnet"),
    pytest.param("rrdbnet", {"scale": 2, "blocks": 1, "width": 6}, (2, 3, 6, 5), id="rrdbnet"),
    pytest.param("srcnn", {"scale": 3}, (2, 1, 6, 5), id="srcnn"),
    pytest.param("srdensenet", {"blocks": 2, "growth_rate": 3}, (2, 1, 4, 3), id="srdensenet"),
    pytest.param("stochastic_depth_cifar", {"depth": 20}, (2, 3, 8, 8), id="stochastic_depth_cifar"),
    pytest.param("vdsr", {"depth": 3}, (2, 1, 6, 5), id="vdsr"),
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
    assert made.dtype == (
        torch.float32 if name in ("drcn", "edsr", "edsr_baseline", "vdsr") else torch.bfloat16
    )  # sums in float32
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


@pytest.mark.parametrize(("name", "arguments", "shape"), SMALL)
def test_training_compiles_as_one_graph(name, arguments, shape):
    """With the numbers and running statistics of eager training, but for FractalNet, which draws other paths."""
    model, x = models.create(name, **arguments), torch.randn(shape)
    eager = copy.deepcopy(model)
    torch._dynamo.reset()  # shapes that other tests compiled for would count as changing ones
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in range(3):
        torch.manual_seed(seed)
        made = compiled(x)
        made.sum().backward()
        torch.manual_seed(seed)
        if name != "fractalnet":
            torch.testing.assert_close(made, eager(x))
    assert counter.frame_count == 1
    for buffer, wanted in zip(model.buffers(), eager.buffers(), strict=True):
        if name != "fractalnet":
            torch.testing.assert_close(buffer, wanted)


@pytest.mark.parametrize("name", ["fractalnet", "stochastic_depth_cifar"])
def test_counts_of_the_catalogue_do_not_depend_on_chance(name):
    info, counts = CATALOGUE[name], set()
    for _ in range(3):
        with torch.device("meta"):
            model = models.create(name, **info.kwargs)
        counts.add(count_model(model, info.shape))
    assert len(counts) == 1


_BLOCKS = (fastdense.nn.DenseBlock, fastdense.nn.DualPathBlock)


def test_small_networks_are_all_that_have_no_memory_modes():
    assert [case.values[0] for case in SMALL] == [name for name in models.list() if not models.memory_modes(name)]


def test_memory_modes_are_those_of_the_blocks():
    for name in models.list():
        with torch.device("meta"):
            model = models.create(name)
        modes = {kind.memory_modes for _, module, kind in find(model) if isinstance(module, _BLOCKS)}
        assert models.memory_modes(name) == (modes.pop() if modes else ()), name
        assert not modes, name

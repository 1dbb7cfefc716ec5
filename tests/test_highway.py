# SPDX-License-Identifier: Apache-2.0
"""Highway layers and networks: counts, the limits of the gate, residual networks as a special case."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdense import models
from fastdense.nn import HighwayConv2d, HighwayLinear


def set_gate(layer: nn.Module, bias: float, *, weights: bool = True) -> None:
    """Gives all gates one bias and, unless ``weights``, nothing else."""
    inner = layer.conv if isinstance(layer, HighwayConv2d) else layer.linear
    channels = inner.weight.shape[0] // 2
    with torch.no_grad():
        inner.bias[channels:] = bias
        if not weights:
            inner.weight[channels:] = 0


def layers(dtype=torch.float64):
    yield HighwayConv2d(3, transform_bias=-2).to(dtype), torch.randn(2, 3, 5, 4, dtype=dtype)
    yield HighwayLinear(6, activation="tanh").to(dtype), torch.randn(4, 6, dtype=dtype)


def transform(layer, x):
    """H of the layer."""
    if isinstance(layer, HighwayConv2d):
        weight, bias = (p.chunk(2)[0] for p in layer.conv.parameters())
        return F.conv2d(x, weight, bias, padding=layer.conv.padding).relu()
    weight, bias = (p.chunk(2)[0] for p in layer.linear.parameters())
    return F.linear(x, weight, bias).tanh()


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("highway_cifar", {}, 2_256_838),
        ("highway_cifar", {"num_classes": 100}, 2_265_928),
        ("highway_mnist", {}, 151_690),
        ("highway_mnist", {"width": 16}, 38_986),
        ("highway_mlp", {"depth": 100}, 784 * 50 + 50 + 99 * 2 * (50 * 50 + 50) + 50 * 10 + 10),
    ],
)
def test_parameter_counts(name, arguments, parameters):
    with torch.device("meta"):
        model = models.create(name, **arguments)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_numbers_of_layers():
    def layers_of(model):
        return sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())

    assert layers_of(models.highway_cifar()) == 19
    assert layers_of(models.highway_mnist()) == 10
    for depth in (10, 20, 50, 100):
        assert layers_of(models.highway_mlp(depth)) == depth + 1


def test_images_shrink_as_in_caffe():
    sizes = []
    model = models.highway_mnist(8)
    for module in model.features:
        if isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(lambda _, x, y: sizes.append((x[0].shape[-1], y.shape[-1])))
    model(torch.randn(1, 1, 28, 28))
    assert sizes == [(24, 12), (12, 6), (6, 3)]


def test_pooling_windows_start_at_the_first_pixel():
    pools = [module for module in models.highway_mnist(8).features if isinstance(module, nn.MaxPool2d)]
    row = torch.arange(8.0).expand(1, 1, 8, 8)
    assert [pool(row)[0, 0, 0].tolist() for pool in pools] == [[2, 4, 6, 7], [2, 4, 6, 7], [1, 3, 5, 7]]


def test_a_closed_gate_is_the_identity_with_the_identity_as_its_jacobian():
    for layer, x in layers():
        set_gate(layer, -40)
        torch.testing.assert_close(layer(x), x, rtol=0, atol=1e-15)
        jacobian = torch.autograd.functional.jacobian(lambda v: layer(v).flatten(), x).reshape(x.numel(), x.numel())  # noqa: B023
        torch.testing.assert_close(jacobian, torch.eye(x.numel(), dtype=x.dtype), rtol=0, atol=1e-15)


def test_an_open_gate_is_the_transform_with_its_jacobian():
    for layer, x in layers():
        set_gate(layer, 40)
        torch.testing.assert_close(layer(x), transform(layer, x))
        made, wanted = (
            torch.autograd.functional.jacobian(lambda v: function(v).flatten(), x)  # noqa: B023
            for function in (layer, lambda v: transform(layer, v))  # noqa: B023
        )
        torch.testing.assert_close(made, wanted)


def test_an_undecided_gate_is_the_mean():
    for layer, x in layers():
        set_gate(layer, 0, weights=False)
        torch.testing.assert_close(layer(x), (x + transform(layer, x)) / 2)


def test_transform_and_carry_of_one_is_a_residual_layer():
    """y = T H + C x with T = C = 1 is H + x: twice the layer whose gate says one half."""
    for layer, x in layers():
        set_gate(layer, 0, weights=False)
        torch.testing.assert_close(2 * layer(x), x + transform(layer, x))


@pytest.mark.parametrize("bias", [-1.0, -2.0, -3.0])
def test_gates_start_at_the_sigmoid_of_their_bias(bias):
    for layer in (HighwayConv2d(8, transform_bias=bias), HighwayLinear(8, transform_bias=bias)):
        inner = layer.conv if isinstance(layer, HighwayConv2d) else layer.linear
        zero = torch.zeros(1, 8, 4, 4) if isinstance(layer, HighwayConv2d) else torch.zeros(1, 8)
        gate = inner(zero)[:, 8:].sigmoid()
        torch.testing.assert_close(gate, torch.full_like(gate, 1 / (1 + math.exp(-bias))))
        torch.testing.assert_close(inner(zero)[:, :8], torch.zeros_like(gate))
    assert 1 / (1 + math.exp(2)) == pytest.approx(0.1192, abs=5e-5)


def test_weights_are_scaled_by_their_fan_in():
    weight = HighwayConv2d(64).conv.weight
    assert weight[:64].std().item() == pytest.approx(math.sqrt(2 / 576), rel=0.02)
    assert weight[64:].std().item() == pytest.approx(math.sqrt(1 / 576), rel=0.02)


def test_a_hundred_layers_pass_gradients_to_the_first():
    model = models.highway_mlp(100, transform_bias=-4, activation="tanh")
    F.cross_entropy(model(torch.randn(8, 1, 28, 28)), torch.arange(8)).backward()
    first, last = model.hidden[0].weight.grad.norm(), model.hidden[-1].linear.weight.grad.norm()
    assert first > 1e-3 * last


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("highway_cifar", {}, (2, 3, 16, 16)),
        ("highway_mnist", {"width": 4}, (2, 1, 28, 28)),
        ("highway_mlp", {"depth": 10}, (2, 1, 28, 28)),
        ("highway_mlp", {"depth": 10, "activation": "tanh"}, (2, 784)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_and_reloads(name, arguments, shape, dtype):
    model = models.create(name, **arguments).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    before = model.classifier.weight.detach().clone()
    loss = F.cross_entropy(model(x).float(), torch.tensor([0, 9]))
    loss.backward()
    optimiser.step()
    assert loss.isfinite()
    assert not torch.equal(model.classifier.weight, before)
    copied = models.create(name, **arguments).to(dtype)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied.eval()(x), model.eval()(x))


def test_dropout_is_used_in_training_only():
    model, x = models.highway_mnist(4).eval(), torch.randn(2, 1, 28, 28)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_compiles_as_one_graph():
    model, x = models.highway_mlp(10), torch.randn(3, 784)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    made = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(made, [p.grad for p in model.parameters()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HighwayConv2d(0), "HighwayConv2d: expected channels to be positive, got 0"),
        (lambda: HighwayConv2d(3, 2), "HighwayConv2d: expected kernel_size to be odd, got 2"),
        (lambda: HighwayLinear(3, activation="elu"), r"HighwayLinear: expected activation to be one of .*, got 'elu'"),
        (lambda: models.highway_mlp(1), "HighwayMlp: expected depth to be at least 2, got 1"),
        (lambda: models.highway_mlp(9, activation="identity"), "HighwayMlp: expected activation to be one of"),
        (lambda: models.highway_cifar(drop_rate=2.0), "HighwayCifar: expected drop_rate to be a probability"),
        (lambda: models.highway_mnist()(torch.zeros(1, 1, 32, 32)), "expected x to have 28 x 28 pixels, got shape"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()

# SPDX-License-Identifier: Apache-2.0
"""ResNet in ResNet: counts, the two streams, ResNet Init as one convolution, the nets it contains."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdense import models
from fastdense.models.resnet_in_resnet import GeneralizedResidualBlock, RiRBlock
from tests.cases.random_norms import random_norms


def image(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 7, 6, dtype=torch.float64)


def norm_relu(bn: nn.BatchNorm2d, x: torch.Tensor, part: slice) -> torch.Tensor:
    """The norm of one stream, in evaluation, then ReLU."""
    y = F.batch_norm(x, bn.running_mean[part], bn.running_var[part], bn.weight[part], bn.bias[part], eps=bn.eps)
    return y.relu()


def two_streams(block: GeneralizedResidualBlock, r, t, shortcut):
    """The equations, with four convolutions and an addition."""
    n, m = block.in_channels, block.conv.out_channels // 2
    weight, stride = block.conv.weight, block.conv.stride[0]

    def conv(x, rows, columns):
        return F.conv2d(x, weight[rows, columns], stride=stride, padding=1)

    old, new = (slice(0, n), slice(n, None)), (slice(0, m), slice(m, None))
    r_next = conv(r, new[0], old[0]) + conv(t, new[0], old[1])
    r_next = r_next if shortcut is None else r_next + shortcut(r)
    t_next = conv(r, new[1], old[0]) + conv(t, new[1], old[1])
    return norm_relu(block.norm, r_next, new[0]), norm_relu(block.norm, t_next, new[1])


def option_a(stride: int, new_channels: int):
    return lambda r: F.pad(r[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, new_channels))


def count(**arguments) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in models.create("resnet_in_resnet", **arguments).parameters())


def test_parameter_counts():
    assert count(shortcut="projection") == 9_492_980
    assert count(shortcut="projection", num_classes=100) == 9_527_720
    projections = 48 * 96 + 96 * 192
    assert count() == 9_492_980 - projections
    assert count(outer=False) == count()


def test_convolutions_cost_as_much_as_those_of_a_plain_net():
    with torch.device("meta"):
        model = models.resnet_in_resnet()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 18
    assert sum(conv.weight.numel() for conv in convolutions) == 9_462_048
    widths = [96] * 5 + [192] * 6 + [384] * 6
    plain = 3 * 96 * 9 + sum(9 * a * b for a, b in itertools.pairwise(widths)) + 384 * 10
    assert plain == 9_462_048
    norms = sum(m.weight.numel() + m.bias.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert norms == 7_892


def test_images_are_halved_twice_by_second_layers():
    model = models.resnet_in_resnet(width=2)
    shapes = []
    for module in model.modules():
        if isinstance(module, GeneralizedResidualBlock):
            module.register_forward_hook(lambda _, x, y: shapes.append((x[0].shape[1:3], y.shape[1:3])))
    model(torch.randn(2, 3, 32, 32))
    expected = [((4, 32), (4, 32))] * 4
    expected += [((4, 32), (8, 32)), ((8, 32), (8, 16)), *[((8, 16), (8, 16))] * 4]
    expected += [((8, 16), (16, 16)), ((16, 16), (16, 8)), *[((16, 8), (16, 8))] * 4]
    assert [(tuple(a), tuple(b)) for a, b in shapes] == expected


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [(3, 3), (3, 5), (3, 8)])
def test_one_convolution_is_the_two_streams(channels, stride):
    block = random_norms(GeneralizedResidualBlock(*channels, stride)).double().eval()
    x = image(2 * channels[0])
    expected = two_streams(block, *x.chunk(2, 1), option_a(stride, channels[1] - channels[0]))
    torch.testing.assert_close(block(x), torch.cat(expected, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_projection(stride):
    block = random_norms(GeneralizedResidualBlock(3, 5, stride, "projection")).double().eval()
    x = image(6)
    expected = two_streams(block, *x.chunk(2, 1), block.projection)
    torch.testing.assert_close(block(x), torch.cat(expected, 1), rtol=0, atol=1e-12)
    assert GeneralizedResidualBlock(3, 3, stride, "projection").projection is None


def test_effective_weight_is_a_partial_identity_away():
    block = GeneralizedResidualBlock(2, 3).double()
    difference = block.effective_weight() - block.conv.weight
    expected = torch.zeros(6, 4, 3, 3, dtype=torch.float64)
    expected[0, 0, 1, 1] = expected[1, 1, 1, 1] = 1
    torch.testing.assert_close(difference, expected)


def test_weight_decay_acts_on_the_weight_without_the_identity():
    block = GeneralizedResidualBlock(2, 2).double()
    with torch.no_grad():
        block.conv.weight.zero_()
    optimiser = torch.optim.SGD(block.parameters(), lr=0.1, weight_decay=1.0)
    block(image(4)).sum().mul(0).backward()
    optimiser.step()
    assert not block.conv.weight.any()
    assert block.effective_weight().sum() == 2


def test_gradients_are_those_of_the_two_streams():
    block = random_norms(GeneralizedResidualBlock(3, 5, 2)).double().eval()
    x = image(6).requires_grad_()
    expected = torch.cat(two_streams(block, *x.chunk(2, 1), option_a(2, 2)), 1)
    parameters = [x, *block.parameters()]
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(block(x).square().sum(), parameters), wanted)


def test_without_transient_weights_it_is_a_residual_layer():
    """W_tr = 0: the residual stream is that of a residual network with one layer a block."""
    block = random_norms(GeneralizedResidualBlock(3, 3)).double().eval()
    with torch.no_grad():
        block.conv.weight[:3, 3:] = 0
    x = image(6)
    r = x[:, :3]
    y = F.conv2d(r, block.conv.weight[:3, :3], padding=1) + r
    torch.testing.assert_close(block(x)[:, :3], norm_relu(block.norm, y, slice(0, 3)), rtol=0, atol=1e-12)


def test_without_residual_weights_and_shortcut_it_is_a_plain_layer():
    block = random_norms(GeneralizedResidualBlock(3, 3, 1, "none")).double().eval()
    with torch.no_grad():
        block.conv.weight[:, :3] = 0
    x = image(6)
    y = F.conv2d(x[:, 3:], block.conv.weight[3:, 3:], padding=1)
    torch.testing.assert_close(block(x)[:, 3:], norm_relu(block.norm, y, slice(3, None)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize(("channels", "stride"), [((3, 3), 1), ((3, 6), 2)])
def test_outer_shortcut_is_on_the_residual_stream_only(channels, stride, outer):
    block = random_norms(RiRBlock(*channels, stride, outer=outer)).double().eval()
    x = image(2 * channels[0])
    new = channels[1] - channels[0]
    r, t = two_streams(block.layer1, *x.chunk(2, 1), option_a(1, new))
    r, t = two_streams(block.layer2, r, t, option_a(stride, 0))
    if outer:
        r = r + option_a(stride, new)(x[:, : channels[0]])
    torch.testing.assert_close(block(x), torch.cat([r, t], 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("arguments", [{}, {"shortcut": "projection", "head_relu": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_and_reloads(arguments, dtype):
    model = models.create("resnet_in_resnet", width=4, num_classes=7, **arguments).to(dtype)
    x = torch.randn(3, 3, 17, 16, dtype=dtype)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    before = model.conv1.weight.detach().clone()
    loss = F.cross_entropy(model(x).float(), torch.tensor([0, 3, 6]))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    optimiser.step()
    assert loss.isfinite()
    assert not torch.equal(model.conv1.weight, before)
    copied = models.create("resnet_in_resnet", width=4, num_classes=7, **arguments).to(dtype)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied.eval()(x), model.eval()(x))
    assert (model(x) >= 0).all() == bool(arguments.get("head_relu"))


def test_compiles_as_one_graph():
    model, x = models.resnet_in_resnet(width=2).eval(), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"GeneralizedResidualBlock: expected shortcut to be one of .*, got 'conv'"):
        models.resnet_in_resnet(shortcut="conv")
    with pytest.raises(ValueError, match="GeneralizedResidualBlock: expected out_channels to be at least 4, got 3"):
        GeneralizedResidualBlock(4, 3)

# SPDX-License-Identifier: Apache-2.0
"""The dense blocks of SRDenseNet on one buffer: the library's own, and those that conversion finds."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fastdense
from fastdense.models import SRDenseNet
from fastdense.nn.dense_block import DenseFeatures
from fastdense.nn.sr_dense_block import SRDenseBlock
from fastdense.plain.sr_dense_block import PlainSRDenseBlock


def plain(model: nn.Module) -> nn.Module:
    return fastdense.restore(copy.deepcopy(model))


def with_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


def check_same(model: nn.Module, other: nn.Module, x: Tensor) -> None:
    for made, expected in zip(with_gradients(model, x), with_gradients(other, x), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-10)


def blocks(growth: int = 3, layers: int = 3) -> DenseFeatures:
    made = layers * growth
    return DenseFeatures(*(SRDenseBlock(5 + at * made, growth, layers) for at in range(3))).double()


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Of tensors kept for backward that are no parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    assert out.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


def test_the_network_is_its_plain_modules():
    net, x = SRDenseNet(3, 4, 3, 5).double(), torch.randn(2, 1, 7, 6, dtype=torch.float64)
    other = plain(net)
    assert list(net.state_dict()) == list(other.state_dict())
    assert "dense_blocks.0.block.3.conv.bias" in net.state_dict()
    assert type(other.dense_blocks) is nn.Sequential and type(other.dense_blocks[0]) is PlainSRDenseBlock
    check_same(net, other, x)
    again = fastdense.convert(copy.deepcopy(other))
    assert type(again.dense_blocks) is DenseFeatures and type(again.dense_blocks[0]) is SRDenseBlock
    check_same(again, other, x)


def test_a_row_of_blocks_keeps_one_buffer():
    model, x = blocks(), torch.randn(2, 5, 6, 4, dtype=torch.float64)
    assert kept_bytes(model, x) == 8 * 2 * 24 * (5 + 3 * 9)
    assert kept_bytes(plain(model), x) > 2 * kept_bytes(model, x)


def test_rows_end_where_a_block_is_watched_or_differs(recwarn):
    model, x, seen = blocks(), torch.randn(1, 5, 6, 4, dtype=torch.float64), []
    other = plain(model)
    handle = model[1].register_forward_hook(lambda *_: seen.append(1))
    check_same(model, other, x)
    assert seen == [1]
    handle.remove()
    model = DenseFeatures(SRDenseBlock(5, 3, 3), SRDenseBlock(14, 2, 4)).double()
    check_same(model, plain(model), x)
    assert not recwarn.list
    model[1].block[2].register_forward_hook(lambda *_: seen.append(2))
    with pytest.warns(UserWarning, match=r"SRDenseBlock runs as plain modules: block\.2 has hooks"):
        model(x)
    assert seen == [1, 2]


def test_autocast():
    model, x = blocks().float(), torch.randn(1, 5, 6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        made, expected = model(x), plain(model)(x)
    assert made.dtype == torch.bfloat16
    assert (made - expected).norm() <= 0.02 * expected.norm()
    made.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


# Blocks of other libraries --------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, inputs: int, outputs: int, slope: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.act = nn.LeakyReLU(slope) if slope else nn.ReLU(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Appending(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], 1)


class Block(nn.Module):
    """As in reimplementations: layers that concatenate, and the block's input in front of all."""

    def __init__(self, inputs: int, slope: float = 0.0) -> None:
        super().__init__()
        self.block = nn.Sequential(Layer(inputs, 3, slope), Appending(3, 3, slope), Appending(6, 3, slope))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.block(x)], 1)


class WithoutInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("slope", [0.0, 0.15])
def test_blocks_of_other_libraries_are_found(slope, recwarn):
    model = nn.Sequential(nn.Conv2d(2, 5, 3), Block(5, slope), Block(14, slope), nn.Conv2d(23, 1, 1)).double()
    x, other = torch.randn(2, 2, 7, 6, dtype=torch.float64), copy.deepcopy(model)
    keys = list(model.state_dict())
    fastdense.convert(model)
    assert list(model.state_dict()) == keys
    assert [(row.kind, row.runs) for row in fastdense.report(model).rows] == [("growing dense", "fused")] * 2
    check_same(model, other, x)
    buffer, input = 8 * 2 * 20 * 23, 8 * x.numel()  # the first convolution keeps its input, the last the buffer
    assert kept_bytes(model, x) == buffer + input
    fastdense.restore(model)
    assert type(model[1]) is Block and type(model) is nn.Sequential
    assert not recwarn.list


class Clipped(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-40, 40)


@pytest.mark.parametrize("make", [WithoutInput, Clipped])
def test_what_computes_something_else_stays_plain(make):
    model = nn.ModuleList([make(5)])
    with pytest.warns(
        UserWarning,
        match="0 stays plain: its results differ from its input, concatenated with the features of its layers",
    ):
        fastdense.convert(model)
    assert type(model[0]) is make

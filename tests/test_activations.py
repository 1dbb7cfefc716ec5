# SPDX-License-Identifier: Apache-2.0
"""Activations to the last digits, on every instruction set, and which modules stand for them.

A tail of a norm that changes nothing hands the operator's own values and derivatives out.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastdense.fusion.checks import NotFusible
from fastdense.fusion.dense_layers import is_activation, read_activation
from fastdense.ops import Activation, NormWeights, TailWeights, dense_block
from fastdense.reference import activate
from tests.cases.dense_block import ACTIVATIONS
from tests.cases.simd import available_levels, simd_level


def run(act: Activation, u: Tensor) -> tuple[Tensor, Tensor]:
    """Values and derivatives."""
    channels = 37  # fills no vector
    padded = torch.cat([u, u.new_zeros(-len(u) % channels)]).view(1, -1, channels).movedim(1, 2).requires_grad_()
    one, zero = u.new_ones(channels), u.new_zeros(channels)
    if act.name == "prelu":
        act = act._replace(weight=torch.full_like(u[:1], 0.25))
    out, _ = dense_block(padded, [], tail=TailWeights(NormWeights(None, None, zero, one, 0.0), None, True, act))
    (slope,) = torch.autograd.grad(out.sum(), padded)
    return tuple(t.detach().movedim(1, 2).flatten()[: len(u)] for t in (out, slope))  # type: ignore[return-value]


def exact(act: Activation, u: Tensor) -> tuple[Tensor, Tensor]:
    """The same by torch, with formulas that keep their digits where torch's do not."""
    u = u.double().requires_grad_()
    if act.name == "prelu":
        act = act._replace(weight=u.new_full((1,), 0.25))
    forms: dict[str, Callable[[], Tensor]] = {
        "gelu": lambda: u * torch.special.erfc(-u / math.sqrt(2)) / 2,
        "gelu_tanh": lambda: u * torch.sigmoid(math.sqrt(8 / math.pi) * (u + 0.044715 * u**3)),
    }
    value = forms.get(act.name, lambda: activate(u, act))()
    (slope,) = torch.autograd.grad(value.sum(), u)
    return value.detach(), slope


def numbers(dtype: torch.dtype) -> Tensor:
    """Near the knees, in the tails, and in between."""
    knees = torch.tensor([-3.0, 0.0, 3.0, 6.0], dtype=torch.float64)
    near = (knees[:, None] + torch.linspace(-1e-2, 1e-2, 401, dtype=torch.float64)).flatten()
    return torch.cat([torch.linspace(-8, 20, 20011, dtype=torch.float64), near]).to(dtype)


@pytest.mark.parametrize("level", available_levels())
@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda act: act.name)
def test_float32_is_good_to_the_last_digits(act, level):
    u = numbers(torch.float32)
    with simd_level(level):
        value, slope = run(act, u)
    wanted, wanted_slope = exact(act, u)
    exponent = 1.6 * (u + 0.044715 * u**3).abs() if act.name == "gelu_tanh" else 0  # whose rounding counts
    digits = 2 if act.name in ("tanh", "sigmoid", "silu") else 4
    assert ((value.double() - wanted).abs() <= spacing_of(wanted) * (digits + 4 * exponent)).all()
    assert (slope.double() - wanted_slope).abs().max() < 2.5 * torch.finfo(torch.float32).eps


def spacing_of(wanted: Tensor) -> Tensor:
    """Between the float32 numbers next to these, away from zero."""
    near = wanted.float().abs()
    return (near.nextafter(torch.tensor(math.inf)) - near).double()


@pytest.mark.parametrize("level", available_levels())
def test_tail_of_the_normal_distribution(level):
    """GELU is u times it: good to 2.2 units in the last place."""
    u = torch.cat([torch.linspace(-13, 0, 300_001), -torch.logspace(-8, 0, 50_001)])
    with simd_level(level):
        value, _ = run(Activation("gelu"), u)
    share = torch.special.erfc(-u.double() / math.sqrt(2)) / 2
    wanted = u * share
    bound = 2.2 * spacing_of(share) * u.abs() + 0.5 * spacing_of(wanted)
    assert ((value.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("level", available_levels())
@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda act: act.name)
def test_float64_is_good_to_13_digits(act, level):
    u = numbers(torch.float64)
    with simd_level(level):
        value, slope = run(act, u)
    wanted, wanted_slope = exact(act, u)
    assert ((value - wanted).abs() <= 1e-13 * wanted.abs()).all()
    assert (slope - wanted_slope).abs().max() < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda act: act.name)
def test_limits(act, dtype):
    far = torch.tensor([-1e10, 1e10, -200.0, 200.0, math.inf, math.nan], dtype=dtype)
    value, slope = run(act, far)
    wanted, wanted_slope = exact(act, far[:4])
    torch.testing.assert_close(value[:4].double(), wanted, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(slope[:4].double(), wanted_slope, rtol=1e-6, atol=1e-30)
    assert (
        value[4] == activate(torch.tensor(1e10, dtype=dtype), act._replace(weight=far.new_ones(1))) or value[4].isinf()
    )
    assert value[5].isnan()


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.ReLU(inplace=True), Activation("relu")),
        (nn.LeakyReLU(0.2), Activation("leaky_relu", 0.2)),
        (nn.ELU(0.5), Activation("elu", 0.5)),
        (nn.CELU(2.0), Activation("celu", 2.0)),
        (nn.GELU(), Activation("gelu")),
        (nn.GELU("tanh"), Activation("gelu_tanh")),
        (nn.Softplus(2.0, 10.0), Activation("softplus", 2.0, 10.0)),
        (nn.Identity(), Activation("identity")),
    ],
    ids=repr,
)
def test_modules_that_are_read(module, expected):
    assert read_activation(module, "act") == expected


def test_prelu_brings_its_parameter():
    module = nn.PReLU(3)
    assert read_activation(module, "act").weight is module.weight


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda act: act.name)
def test_every_activation_is_read_from_its_module(act):
    names = {
        "relu": "ReLU",
        "relu6": "ReLU6",
        "leaky_relu": "LeakyReLU",
        "prelu": "PReLU",
        "elu": "ELU",
        "celu": "CELU",
    }
    names |= {"selu": "SELU", "silu": "SiLU", "gelu": "GELU", "gelu_tanh": "GELU"}
    kind = getattr(nn, names.get(act.name, act.name.capitalize()))
    numbers = [number for number in (act.first, act.second) if number != 0]
    module = kind("tanh") if act.name == "gelu_tanh" else kind(*numbers)
    read = read_activation(module, "act")
    assert read._replace(weight=None) == act
    u = numbers_of_both_signs()
    torch.testing.assert_close(activate(u, read), module(u), rtol=0, atol=0)


def numbers_of_both_signs() -> Tensor:
    return torch.linspace(-5, 5, 101)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Softmax(1), "is a Softmax"),
        (nn.Hardsigmoid(), "is a Hardsigmoid"),
        (nn.RReLU(), "is a RReLU"),
        (nn.CELU(-1.0), "alpha that is not above 0"),
        (nn.Softplus(-1.0), "beta that is not above 0"),
        (type("ReLU", (nn.ReLU,), {})(), "no activation that the operator runs"),
    ],
    ids=repr,
)
def test_modules_that_stay_plain(module, message):
    with pytest.raises(NotFusible, match=message):
        read_activation(module, "act")
    assert is_activation(module) == (message.endswith("above 0"))


def test_hooks_on_an_activation_are_seen():
    module = nn.SiLU()
    module.register_forward_hook(lambda *_: None)
    with pytest.raises(NotFusible, match="act has hooks"):
        read_activation(module, "act")

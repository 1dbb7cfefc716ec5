# SPDX-License-Identifier: Apache-2.0
"""Hand-written blocks whose code changes NaN or infinities, and nothing else, run as plain modules."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdense
from tests.cases.converted import fastdense_warnings, fused_calls, one_warning, randomise
from tests.cases.dense_layouts import C0, LAYOUTS, Joining, JoiningInFront, K, Layer, NewestFirstLayer, NewLayer

pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]

REASON = "it treats NaN or infinity in a way of its own"


def no_nan(_, x: Tensor) -> Tensor:
    return torch.nan_to_num(x)


def where_finite(_, x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def masked(_, x: Tensor) -> Tensor:
    return x.masked_fill(x.isnan(), 1.0)


def in_range(_, x: Tensor) -> Tensor:
    return x.clamp(-1e200, 1e200)


def no_infinity(_, x: Tensor) -> Tensor:
    return x.masked_fill(x == math.inf, 0.0)


def in_training(module, x: Tensor) -> Tensor:
    return torch.nan_to_num(x) if module.training else x


def in_eval(module, x: Tensor) -> Tensor:
    return x if module.training else torch.nan_to_num(x)


def zeros_for_all(_, x: Tensor) -> Tensor:
    return x if x.isfinite().all() else torch.zeros_like(x)


def raises(_, x: Tensor) -> Tensor:
    if x.isnan().any():
        raise ValueError("NaN")
    return x


def gradients(_, x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(torch.nan_to_num)
    return x


CHANGES = [no_nan, where_finite, masked, in_range, no_infinity, in_training, in_eval, zeros_for_all, raises, gradients]


def layers_of(change, layer=Layer) -> nn.Module:
    """Layers that change the new features."""

    class Changing(layer):
        def join(self, x: Tensor, new: Tensor) -> Tensor:
            return super().join(x, change(self, new))

    return nn.Sequential(*[Changing(C0 + at * K) for at in range(3)])


def joining(change, around=Joining) -> nn.Module:
    return around(3, container=lambda _: nn.ModuleList(layers_of(change, NewLayer)))


def reading(change) -> nn.Module:
    """Layers that change what they read, and hand on what they were given."""

    class Changing(NewLayer):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, super().forward(change(self, x))], 1)

    return nn.Sequential(*[Changing(C0 + at * K) for at in range(3)])


def last_alone(change) -> nn.Module:
    """Only the last layer changes anything."""
    return nn.Sequential(*[*layers_of(lambda _, x: x)][:2], layers_of(change)[-1])


class Residual(nn.Module):
    def __init__(self, change) -> None:
        super().__init__()
        widths = [(C0, K), (C0 + K, K), (C0 + 2 * K, C0)]
        self.convs = nn.ModuleList([nn.Conv2d(read, made, 3, padding=1) for read, made in widths])
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        features = x
        for conv in self.convs[:-1]:
            new = F.leaky_relu(self.change(self, conv(features)), 0.2)
            features = torch.cat([features, new], 1)
        return 0.2 * self.convs[-1](features) + x


class Growing(nn.Module):
    def __init__(self, change) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(read, K, 3, padding=1) for read in (C0, K, 2 * K)])
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        features = [F.relu(self.convs[0](x))]
        for conv in self.convs[1:]:
            features.append(F.relu(self.change(self, conv(torch.cat(features, 1)))))
        return torch.cat([x, *features], 1)


KINDS = {
    "layers that join": layers_of,
    "new features first": lambda change: layers_of(change, NewestFirstLayer),
    "a block that joins": joining,
    "a block that joins in front": lambda change: joining(change, JoiningInFront),
    "what layers read": reading,
    "the last layer": last_alone,
    "residual": Residual,
    "growing": Growing,
}


def images() -> Tensor:
    return torch.randn(2, C0, 6, 7, dtype=torch.float64)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_what_is_not_finite_keeps_a_block_plain(kind, change):
    model = nn.ModuleList([KINDS[kind](change)])
    classes = [type(m) for m in model.modules()]
    with one_warning("0 stays plain", REASON):
        fastdense.convert(model)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_block_without_a_change_is_fused(kind):
    model = nn.ModuleList([KINDS[kind](lambda _, x: x)])
    fastdense.convert(model)
    assert [row.runs for row in fastdense.report(model).rows] == ["fused"]


@pytest.mark.parametrize("change", [change for change in CHANGES if change is not gradients])
def test_on_a_shared_buffer_the_change_is_kept(change):
    """Where a check of the layers raises, it raises."""
    plain, fast = (randomise(reading(change).double()) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    fastdense.convert(fast, memory="min")
    assert [row.runs for row in fastdense.report(fast).rows] == ["shared buffer"]
    for training in (True, False):
        x = images()
        x[0, 0, 0, 0], x[1, 1, 2, 2] = math.nan, math.inf
        if change is raises:
            for net in (plain, fast):
                with pytest.raises(ValueError, match="NaN"):
                    net.train(training)(x)
        else:
            torch.testing.assert_close(fast.train(training)(x), plain.train(training)(x), equal_nan=True)


def test_features_handed_on_changed_do_not_fit_a_shared_buffer():
    class Changing(Layer):
        def join(self, x: Tensor, new: Tensor) -> Tensor:
            return super().join(torch.nan_to_num(x), new)

    model = nn.ModuleList([nn.Sequential(*[Changing(C0 + at * K) for at in range(3)])])
    with one_warning("0 stays plain", REASON):
        fastdense.convert(model, memory="min")


ACTIVATIONS = {
    "clamp": lambda x: x.clamp(min=0),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "product": lambda x: x * (x > 0),
    "half": lambda x: (x + x.abs()) / 2,
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "leaky, where": lambda x: torch.where(x > 0, x, 0.2 * x),
    "leaky, max": lambda x: torch.max(x, 0.1 * x),
    "swish": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "elu": lambda x: torch.where(x > 0, x, torch.expm1(x)),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d, lambda channels: nn.GroupNorm(1, channels)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_formula_stay_fused(name, norm):
    """Some make NaN of an infinity, or another gradient at NaN, than torch's function of the name."""
    act = ACTIVATIONS[name]

    class Formula(Layer):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.bn1, self.bn2 = norm(channels), norm(self.conv1.out_channels)

        def forward(self, x: Tensor) -> Tensor:
            return self.join(x, self.conv2(act(self.bn2(self.conv1(act(self.bn1(x)))))))

    model = nn.ModuleList([nn.Sequential(*[Formula(C0 + at * K) for at in range(3)])])
    fastdense.convert(model)
    assert [row.runs for row in fastdense.report(model).rows] == ["fused"]


def test_where_autograd_looks_for_nan():
    with torch.autograd.set_detect_anomaly(True):
        model = fastdense.convert(nn.Sequential(LAYOUTS["a block that joins"](2)))
        assert torch.is_anomaly_enabled()
    assert fused_calls(model, images().float()) == [(2, "none")]


def test_a_failed_pass_leaves_nothing_behind():
    """Neither gradients nor statistics of a pass that raised reach the comparison with another form."""
    model = nn.ModuleList([layers_of(raises, NewestFirstLayer)])
    with fastdense_warnings() as messages:
        fastdense.convert(model)
    assert len(messages) == 1 and REASON in messages[0]

# SPDX-License-Identifier: Apache-2.0
"""What looks like a dense block of an unknown class but cannot be fused stays plain, with a reason."""

import random

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fastdense
from tests.cases.converted import fastdense_warnings, fused_calls, one_warning, randomise
from tests.cases.dense_layouts import C0, Joining, K, Layer, Net, NewLayer, SequenceLayer, plain_sequence

pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]


def of(layer):
    """A block whose layers, of the given class, join."""
    return lambda layers: plain_sequence(layers, layer)


class Leaky(Layer):
    def forward(self, x):
        return torch.cat([x, self.conv2(F.relu(self.bn2(self.conv1(F.leaky_relu(self.bn1(x))))))], 1)


class Skipping(Layer):
    """The new features stand in front of the input here, and behind it there."""

    def join(self, x, new):
        return torch.cat([new, x] if x.shape[1] == C0 else [x, new], 1)


class Rare(Layer):
    """Drops itself rarely: never in a trial."""

    def join(self, x, new):
        return torch.cat([x, new * float(torch.rand(()) > 1e-6)], 1)


class RarePython(Layer):
    def join(self, x, new):
        return torch.cat([x, new * float(random.random() > 1e-6)], 1)


class Detached(Layer):
    def join(self, x, new):
        return torch.cat([x.detach(), new], 1)


class Counting(Layer):
    steps = 0

    def join(self, x, new):
        self.steps = self.steps + 1
        return super().join(x, new)


class TwiceDropped(Layer):
    def forward(self, x):
        out = F.dropout(self.conv1(F.relu(self.bn1(x))), 0.2, self.training)
        return self.join(x, F.dropout(self.conv2(F.relu(self.bn2(out))), 0.2, self.training))


class EvalOnly(Layer):
    def join(self, x, new):
        return super().join(x, new if self.training else new * 0.9)


class OtherWithoutGradients(Layer):
    def join(self, x, new):
        return super().join(x, new if torch.is_grad_enabled() else new * 2)


class OtherInInference(Layer):
    def join(self, x, new):
        return super().join(x, new * 2 if torch.is_inference_mode_enabled() else new)


class OtherForLeaves(Layer):
    def join(self, x, new):
        return super().join(x, new if new.requires_grad else new * 2)


class AlwaysDropped(Layer):
    def join(self, x, new):
        return super().join(x, F.dropout(new, 0.5))


class Scaled(Layer):
    def __init__(self, channels):
        super().__init__(channels)
        self.gamma = nn.Parameter(torch.ones(K, 1, 1))

    def join(self, x, new):
        return super().join(x, new * self.gamma)


class Clipped(Layer):
    """ReLU of a limited range: only large numbers tell."""

    limit = 20.0

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)).clamp(max=self.limit))
        return self.join(x, self.conv2(F.relu(self.bn2(out)).clamp(max=self.limit)))


class ClippedFar(Clipped):
    limit = 65504.0


class ClippedSamples(Clipped):
    def __init__(self, channels):
        super().__init__(channels)
        self.bn1, self.bn2 = nn.InstanceNorm2d(channels), nn.InstanceNorm2d(self.bn2.num_features)


class ClippedInput(Layer):
    def forward(self, x):
        return self.join(x, super().forward(x.clamp(-30, 30))[:, -K:])


class ClippedFeatures(Layer):
    def join(self, x, new):
        return super().join(x, new.clamp(-30, 30))


class OtherSoftplus(Layer):
    def forward(self, x):
        out = self.conv1(F.softplus(self.bn1(x), 1, 10))
        return self.join(x, self.conv2(F.softplus(self.bn2(out), 1, 10)))


class PostActivation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(channels, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, K, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv2(F.relu(self.bn(self.conv1(x))))], 1)


def sharing(layers):
    """All layers have one second norm."""
    made = plain_sequence(layers)
    for layer in made:
        layer.bn2 = made[0].bn2
    return made


def with_module(change):
    """A block of sequences that a function edits."""

    def block(layers):
        made = plain_sequence(layers, SequenceLayer)
        for layer in made:
            change(layer)
        return made

    return block


def set_module(index, make):
    def change(layer):
        layer[index] = make(layer[index])

    return with_module(change)


NOT_RESULTS = "its results differ from those of a dense block: norm, activation and convolution on all earlier features"
PLAIN = {
    "leaky": (of(Leaky), NOT_RESULTS),
    "mixed orders": (of(Skipping), NOT_RESULTS),
    "gradient stopped": (of(Detached), NOT_RESULTS),
    "other in eval": (of(EvalOnly), NOT_RESULTS),
    "other without gradients": (of(OtherWithoutGradients), "its results are others without gradients"),
    "other in inference mode": (of(OtherInInference), "its results are others without gradients"),
    "other where nothing requires grad": (of(OtherForLeaves), "its results are others without gradients"),
    "clipped": (of(Clipped), NOT_RESULTS),
    "clipped far": (of(ClippedFar), NOT_RESULTS),
    "clipped input": (of(ClippedInput), NOT_RESULTS),
    "clipped features": (of(ClippedFeatures), NOT_RESULTS),
    "clipped behind norms without weights": (of(ClippedSamples), NOT_RESULTS),
    "softplus with another threshold": (of(OtherSoftplus), NOT_RESULTS),
    "dropout inside": (of(TwiceDropped), NOT_RESULTS),
    "dropout in eval": (of(AlwaysDropped), "its dropout has more than one rate, or is active in eval mode"),
    "random": (of(Rare), "its forward draws random numbers"),
    "python's random": (of(RarePython), "its forward draws random numbers"),
    "counting": (of(Counting), "its forward changes its attributes"),
    "a norm of all layers": (sharing, "0 and 1 share a BatchNorm2d"),
    "layer scale": (of(Scaled), "0 has parameters of its own"),
    "post-activation": (of(PostActivation), "0 is Conv2d, BatchNorm2d, Conv2d: expected norm, convolution"),
    "a list of layers that needs lists": (of(NewLayer), "it fails when called with one tensor"),
    "softmax": (
        set_module(1, lambda _: nn.Softmax(1)),
        "its layers have Softmax: expected only batch, instance and group norms, activations",
    ),
    "CELU of no use": (set_module(1, lambda _: nn.CELU(-1.0)), r"CELU\(alpha=-1.0\) has an alpha that is not above 0"),
    "local norm": (
        set_module(3, lambda _: nn.LocalResponseNorm(3)),
        "0 is BatchNorm2d, Conv2d, Conv2d: expected norm, convolution",
    ),
    "one group norm": (
        set_module(3, lambda norm: nn.GroupNorm(2, norm.num_features)),
        "some of its norms take statistics of the batch, others of each sample",
    ),
    "stride": (set_module(2, lambda c: nn.Conv2d(c.in_channels, 8, 1, stride=2)), "0.2 is Conv2d.*: expected stride 1"),
    "groups": (
        set_module(5, lambda c: nn.Conv2d(8, K, 3, padding=1, groups=2, bias=False)),
        r"0.5 is Conv2d.*: expected stride 1, groups 1",
    ),
    "dropout of channels": (set_module(6, lambda _: nn.Dropout2d(0.5)), "its forward draws random numbers"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_computes_something_else_stays_plain(name):
    block, reason = PLAIN[name]
    model = nn.ModuleList([block(3)])
    classes = [(type(m), sorted(vars(m))) for m in model.modules()]
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    with pytest.warns(UserWarning, match=f"^fastdense: 0 stays plain: {reason}") as caught:
        fastdense.convert(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert [(type(m), sorted(vars(m))) for m in model.modules()] == classes
    (row,) = fastdense.report(model).rows
    assert row.runs == "plain" and row.reason in str(caught[0].message)


def test_a_module_around_a_plain_sequence_gets_the_one_warning():
    class Residual(Joining):
        def forward(self, x):
            y = x
            for unit in self.units:
                y = torch.cat([y, unit(y)], 1)
            return y * 2

    model = Residual(2, container=lambda units: nn.Sequential(*units))
    with one_warning("Residual stays plain", NOT_RESULTS):
        fastdense.convert(model)


def test_weights_without_values_are_not_tried():
    with torch.device("meta"):
        model = Net(plain_sequence).double()
    with fastdense_warnings() as messages:
        fastdense.convert(model)
    assert [message.split(": ")[-1] for message in messages] == [
        "its weights are on the meta device; convert after loading them"
    ] * 2
    fast = fastdense.convert(randomise(model.to_empty(device="cpu")))
    assert fused_calls(fast.eval(), torch.randn(2, 3, 14, 17, dtype=torch.float64)) == [(2, "none"), (3, "none")]


def test_huge_blocks_are_not_tried(monkeypatch):
    monkeypatch.setattr(fastdense.fusion.equivalence, "_MOST_NUMBERS", 1000)
    with pytest.warns(UserWarning, match="more than 1000 parameters, too many for the equivalence check"):
        fastdense.convert(nn.ModuleList([plain_sequence(3)]))


@pytest.mark.parametrize("name", ["resnet152", "inception_v3", "googlenet", "mobilenet_v3_small", "vit_b_16"])
def test_networks_without_dense_blocks_raise(name):
    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, **options)
    with pytest.raises(ValueError, match="expected model to contain"):
        fastdense.convert(model)


def test_rdnet_says_why_it_stays_plain():
    with torch.device("meta"):
        model = timm.create_model("rdnet_tiny")
    classes = [type(m) for m in model.modules()]
    with fastdense_warnings() as messages:
        fastdense.convert(model)
    assert [type(m) for m in model.modules()] == classes
    rows = fastdense.report(model).rows
    assert len(messages) == len(rows) == 7
    for row, message in zip(rows, messages, strict=True):
        assert (row.kind, row.layers, row.runs) == ("block", 3, "plain")
        assert message == f"fastdense: {row.name} stays plain: {row.reason}"
        assert "LayerNorm2d" in row.reason
        assert "expected only batch, instance and group norms, activations, convolutions and dropout" in row.reason

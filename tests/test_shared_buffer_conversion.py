# SPDX-License-Identifier: Apache-2.0
"""Which dense blocks of any layers go on a shared buffer, and which stay plain; layers under a checkpoint."""

import copy
import queue
import random
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdense
from tests.cases.any_layers import C0, Block, DropPathLayer, K, Layer
from tests.cases.converted import assert_bit_equal, assert_same, fastdense_warnings, one_warning, randomise, step
from tests.cases.shared_buffer import SCALE, images, is_shared, pair, seeded_step

pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]


# --- what stays plain -----------------------------------------------------------------------------------

GENERATOR = torch.Generator()


class Captured(Layer):
    def forward(self, x):
        return super().forward(x) * SCALE.to(x)


class Hidden(Layer):
    def __init__(self, channels, dims=2):
        super().__init__(channels, dims)
        self.others = [nn.BatchNorm2d(K, affine=False)]

    def forward(self, x):
        return self.others[0].to(x)(super().forward(x))


class OwnGenerator(Layer):
    def forward(self, x):
        return super().forward(x) * torch.rand((), generator=GENERATOR, dtype=x.dtype)


class PythonsRandom(Layer):
    def forward(self, x):
        return super().forward(x) * random.random()


class Counting(Layer):
    steps = 0

    def forward(self, x):
        self.steps = self.steps + 1
        return super().forward(x)


class Reversed(Block):
    def forward(self, x):
        return super().forward(x).flip(1)


class Twice(Block):
    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x) + layer(x)], 1)
        return x


class Clipped(Block):
    """What it does between layers shows where numbers are large."""

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1).clamp(-50, 50)
        return x


PLAIN = {
    "captured": (lambda: Block(Captured), "it reads a tensor that requires grad and is none of its parameters"),
    "hidden": (lambda: Block(Hidden), "has modules or parameters that are not registered"),
    "own generator": (lambda: Block(OwnGenerator), "its forward draws from a generator of its own"),
    "python's random": (lambda: Block(PythonsRandom), "its forward draws random numbers"),
    "counting": (lambda: Block(Counting), "its forward changes its attributes"),
    "reversed": (Reversed, "its results differ from those of layers that each read all features before them"),
    "clipped": (Clipped, "its results differ from those of layers that each read all features before them"),
    "twice": (Twice, "its forward does not call each layer once, in order"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_cannot_run_twice_stays_plain(name):
    block, reason = PLAIN[name]
    plain = nn.Sequential(nn.Conv2d(3, C0, 1), block()).double()
    classes = [(type(m), sorted(vars(m))) for m in plain.modules()]
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    with one_warning("1 stays plain", reason):
        fastdense.convert(plain, memory="min")
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert [(type(m), sorted(vars(m))) for m in plain.modules()] == classes


DRAWN: queue.SimpleQueue[float] = queue.SimpleQueue()


class DrawingElsewhere(DropPathLayer):
    """While it runs, another thread draws from torch's generator."""

    def forward(self, x):
        worker = threading.Thread(target=lambda: DRAWN.put(torch.rand(()).item()))
        worker.start(), worker.join()
        return super().forward(x)


def test_the_trial_leaves_the_generator_to_other_threads():
    """They neither draw a number twice nor miss one, and disturb no trial."""
    net = nn.Sequential(nn.Conv2d(3, C0, 1), Block(DrawingElsewhere))
    torch.manual_seed(3)
    assert is_shared(fastdense.convert(net, memory="min"))
    after = torch.get_rng_state()
    drawn = [DRAWN.get() for _ in range(DRAWN.qsize())]
    torch.manual_seed(3)
    assert len(drawn) > 10 and drawn == [torch.rand(()).item() for _ in drawn]
    assert torch.equal(torch.get_rng_state(), after)


class Drawing(Layer):
    """Draws by functions, of which not all take a generator."""

    how = staticmethod(torch.rand_like)

    def forward(self, x):
        out = super().forward(x)
        return out * self.how(out)


def drawing(how) -> type[Layer]:
    return type("DrawingSo", (Drawing,), {"how": staticmethod(how)})


DRAWS = {
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "rand": lambda x: torch.rand(x.shape, dtype=x.dtype),
    "randn": lambda x: torch.randn(x.shape, dtype=x.dtype),
    "randint": lambda x: torch.randint(1, 5, x.shape),
    "randperm": lambda x: torch.randperm(x.shape[-1]),
    "dropout": lambda x: F.dropout(torch.ones_like(x)),
    "alpha_dropout": lambda x: F.alpha_dropout(torch.ones_like(x), training=True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "normal": lambda x: torch.normal(x.detach(), 1.0),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    "multinomial": lambda x: torch.multinomial(torch.ones(5), x.shape[-1], replacement=True),
    "gumbel": lambda x: F.gumbel_softmax(x),
}


@pytest.mark.parametrize("how", DRAWS)
def test_layers_that_draw_in_any_way(how):
    plain, fast = pair(layer=drawing(DRAWS[how]))
    x = images()
    assert_same(seeded_step(fast, x), seeded_step(plain, x))


def test_operators_without_a_generator_stay_plain():
    how = lambda x: torch.native_dropout(torch.ones_like(x), 0.5, True)[0]  # noqa: E731
    net = nn.Sequential(nn.Conv2d(3, C0, 1), Block(drawing(how)))
    with one_warning("1 stays plain", "draws random numbers by aten.native_dropout.default, which takes no generator"):
        fastdense.convert(net, memory="min")


def test_balanced_stays_plain_and_says_what_min_does():
    net = nn.Sequential(nn.Conv2d(3, C0, 1), Block())
    with one_warning("1 stays plain", 'memory="min" runs it on a shared buffer'):
        fastdense.convert(net)
    assert [row.runs for row in fastdense.report(net).rows] == ["plain"]
    assert is_shared(fastdense.convert(net, memory="min"))
    with one_warning('memory="min" runs it on a shared buffer'):
        fastdense.convert(net)
    assert type(net[1]) is Block and [row.runs for row in fastdense.report(net).rows] == ["plain"]


def test_hooks_and_parametrizations_run_the_plain_modules():
    plain, fast = pair()
    seen: list[int] = []
    handle = fast[1].layers[0].body[2].register_forward_hook(lambda *_: seen.append(1))
    x = images()
    with one_warning("1 runs as plain modules", "layers.0.body.2 has hooks"):
        assert_bit_equal(seeded_step(fast, x), seeded_step(plain, x))
    assert seen == [1]
    assert fastdense.report(fast).rows[0].runs == "plain"
    handle.remove()
    assert is_shared(fast)
    nn.utils.parametrizations.weight_norm(fast[1].layers[0].body[2])
    with one_warning("1 runs as plain modules", "has a parametrization"):
        fast(x)


def test_other_arguments_and_transforms_run_the_own_code():
    plain, fast = pair()
    x = images()
    with one_warning("only plain modules support forward-mode derivatives"):
        out, tangent = torch.func.jvp(fast.eval(), (x,), (torch.ones_like(x),))
    expected = torch.func.jvp(plain.eval(), (x,), (torch.ones_like(x),))
    assert torch.equal(out, expected[0]) and torch.equal(tangent, expected[1])
    features = fast[0](x)
    assert torch.equal(fast[1](x=features), plain[1](features))


# --- layers under a checkpoint --------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A layer of gpleiss/efficient_densenet_pytorch."""

    def __init__(self, channels: int, act: type[nn.Module], **options) -> None:
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(channels), act(), nn.Conv2d(channels, 8, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(8), act()
        self.conv2 = nn.Conv2d(8, K, 3, padding=1, bias=False)
        self.options = options

    def forward(self, *features):
        def bottleneck(*features):
            return self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))

        if self.options and any(feature.requires_grad for feature in features):
            y = checkpoint(bottleneck, *features, **self.options)
        else:
            y = bottleneck(*features)
        return self.conv2(self.relu2(self.norm2(y)))


class CheckpointedBlock(nn.Module):
    def __init__(self, act: type[nn.Module] = nn.ReLU, **options) -> None:
        super().__init__()
        for at in range(3):
            self.add_module(f"denselayer{at + 1}", Checkpointed(C0 + at * K, act, **options))

    def forward(self, x):
        features = [x]
        for layer in self.children():
            features.append(layer(*features))
        return torch.cat(features, 1)


@pytest.mark.parametrize("act", [nn.ReLU, nn.Softshrink])
@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_under_a_checkpoint_move_their_statistics_once(reentrant, act):
    torch.manual_seed(0)
    net = randomise(nn.Sequential(nn.Conv2d(3, C0, 1), CheckpointedBlock(act, use_reentrant=reentrant)).double())
    plain = copy.deepcopy(net)
    for layer in plain[1].children():
        layer.options = {}
    with fastdense_warnings() as messages:
        fastdense.convert(net, memory="min")
    assert [message.split(": ")[1] for message in messages] == ["1"]
    assert "under torch.utils.checkpoint move running statistics twice a step" in messages[0]
    runs = "fused" if act is nn.ReLU else "shared buffer"
    assert [row.runs for row in fastdense.report(net).rows] == [runs]
    for _ in range(2):
        x = images()
        assert_same(step(net, x), step(plain, x))
    assert net[1].denselayer1.norm1.num_batches_tracked == 2

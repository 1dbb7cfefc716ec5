# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth in dense blocks and dual path stages: fused against plain, and what a dropped layer leaves alone."""

import copy
import itertools

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import fastdense
from fastdense import models, reference
from fastdense.fusion.dense_layers import layer_weights, read_block
from fastdense.nn import DenseBlock, DenseFeatures, DualPathStage, StochasticDepth, Transition, linear_decay
from tests.cases.converted import assert_same, randomise, step

pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]

SCALES = ("test", "train")


def dense(survival=0.4, **options) -> nn.Module:
    """Two blocks, the first with the transition behind it in its operator call."""
    first = DenseBlock(4, 6, 4, survival=survival, **options)
    last = DenseBlock(3, 7, 4, bottleneck=False, survival=survival, **options)
    return DenseFeatures(first, Transition(first.out_channels, 7), last, nn.BatchNorm2d(last.out_channels))


def dual_path(survival=0.4, **options) -> nn.Module:
    return DualPathStage(4, 6, 8, 9, 3, groups=2, stride=2, survival=survival, **options)


def both(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    fast = randomise(module.double())
    return fast, fastdense.restore(copy.deepcopy(fast))


def image(batch: int = 3) -> Tensor:
    return torch.randn(batch, 6, 12, 10, dtype=torch.float64)


def seeded(net: nn.Module, x: Tensor, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return step(net, x)


def depths(net: nn.Module) -> list[StochasticDepth]:
    return [module for module in net.modules() if isinstance(module, StochasticDepth)]


CASES = [
    *(pytest.param(dense, memory, id=f"dense-{memory}") for memory in ("balanced", "min")),
    *(pytest.param(dual_path, memory, id=f"dual-{memory}") for memory in ("balanced", "min", "reversible")),
]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("make", "memory"), CASES)
def test_fused_is_plain_for_every_draw(make, memory, scale):
    """Plain modules draw in the same order, so a seed gives both the same layers."""
    fast, plain = both(make(memory=memory, survival_scale=scale))
    x, missing = image(), set()
    for seed in range(6):
        made, wanted = seeded(fast, x, seed), seeded(plain, x, seed)
        assert_same(made, wanted)
        missing.add(len(wanted))
    assert len(missing) > 1  # draws differ
    assert_same(step(fast.eval(), x), step(plain.eval(), x))


@pytest.mark.parametrize("scale", SCALES)
def test_a_block_is_the_reference_for_all_gates(scale):
    """Every one of the 2^L outcomes, each with its factors, against concatenation."""
    block = randomise(DenseBlock(3, 6, 4, survival=(0.9, 0.6, 0.5), survival_scale=scale).double())
    x = image()
    for gates in itertools.product((True, False), repeat=3):
        with pytest.MonkeyPatch.context() as patch:
            draws = iter(gates)
            patch.setattr(torch, "rand", lambda size, draws=draws, **_: torch.full(size, 0.0 if next(draws) else 1.0))
            made = block(x)
        layers = []
        for module, p in zip(read_block(block), (0.9, 0.6, 0.5), strict=True):
            weights = layer_weights(module)
            layers.append(weights._replace(conv2=weights.conv2 * (1 / p if scale == "train" else 1)))
        expected, _ = reference.dense_block(x, layers, active=gates)
        torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("make", [dense, dual_path])
def test_evaluation_multiplies_new_features_by_their_probability(make):
    net, other = make(survival=0.5).double().eval(), make(survival=1.0).double().eval()
    other.load_state_dict(net.state_dict())
    x, scaled = image(), copy.deepcopy(net)
    assert not torch.allclose(net(x), other(x))
    last = [m for name, m in scaled.named_modules() if name.endswith(("conv2", "c1x1_c.conv"))]
    probabilities = [drop.survival for drop in depths(net)]
    assert len(last) == len(probabilities) > 3
    with torch.no_grad():
        for conv, p in zip(last, probabilities, strict=True):
            conv.weight.mul_(p)
    other.load_state_dict(scaled.state_dict())
    torch.testing.assert_close(net(x), other(x))
    for drop in depths(net):
        drop.scale = "train"
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))


@pytest.mark.parametrize(("make", "memory"), CASES)
def test_dropped_layers_are_left_alone(make, memory):
    """Their norms keep their statistics and their parameters have no gradient; what reads a block does take part."""
    for survival in (0.0, 1.0):
        net = make(survival=0.4, memory=memory)
        for drop in depths(net):
            drop.survival = survival
        net(image().float()).sum().backward()
        moved = {name for name, b in net.named_buffers() if name.endswith("tracked") and int(b)}
        graded = {name for name, p in net.named_parameters() if p.grad is not None}
        inner = {name for name in moved | graded if "denselayer" in name or "c1x1_a" in name or "c3x3" in name}
        assert bool(inner) == (survival == 1)
        assert graded - inner


@pytest.mark.parametrize("memory", ["balanced", "min", "reversible"])
def test_a_stage_keeps_nothing_for_its_last_block_left_out(memory):
    """A stage whose last block is dropped keeps what the same stage without that block keeps."""
    x, kept = image().float(), []
    for blocks, survival in ((3, 1.0), (4, (1.0, 1.0, 1.0, 0.0))):
        stage = DualPathStage(blocks, 6, 8, 9, 3, groups=2, survival=survival, memory=memory)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: s.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t,
            lambda t: t,
        ):
            stage(x)
        own = {t.untyped_storage().data_ptr() for t in [*stage.parameters(), *stage.buffers()]}
        kept.append(sum(size for at, size in sizes.items() if at not in own))
    assert kept[0] == kept[1]


def test_a_block_without_layers_keeps_its_buffer_alone():
    block = DenseBlock(3, 6, 4, survival=(0.0, 0.0, 0.0))
    sizes = []
    x = image().float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        out = block(x)
    assert torch.equal(out[:, :6], x)
    assert not out[:, 6:].any()
    pixels, statistics = 3 * 12 * 10, 18 + 3 * 16
    assert sum(sizes) == 18 * pixels + 2 * statistics
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("make", [dense, dual_path])
def test_samples_are_dropped_by_plain_modules(make):
    fast, plain = both(make(survival_mode="sample", survival_scale="train"))
    x = image()
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="runs as plain modules: .*stochastic_depth drops per sample"):
        made = fast(x)
    torch.manual_seed(3)
    torch.testing.assert_close(made, plain(x))
    assert_same(step(fast.eval(), x), step(plain.eval(), x))


@pytest.mark.parametrize(("make", "memory"), CASES[:3:2])
def test_one_graph_serves_every_draw(make, memory):
    """The compiled network computes what is left out, and gives the same numbers and statistics."""
    net = randomise(make(memory=memory).double())
    eager, x = copy.deepcopy(net), image()
    torch._dynamo.reset()  # shapes that other tests compiled for would count as changing ones
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for seed in range(4):
        torch.manual_seed(seed)
        wanted = step(eager, x)
        torch.manual_seed(seed)
        made = step(net, x, run=compiled)
        zeros = [name for name in made if name not in wanted]
        assert all(not made.pop(name).any() for name in zeros)  # gradients of what is left out
        assert_same(made, wanted)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        ("densenet_cifar", {"depth": 22}, 9),
        ("densenet121", {}, 58),
        ("dpn68", {}, 22),
        ("fc_densenet56", {}, 44),
    ],
)
def test_models_decay_over_all_their_layers(name, options, layers):
    with torch.device("meta"):
        model = models.create(name, survival=0.5, survival_scale="train", **options)
        plain = models.create(name, **options)
    assert [drop.survival for drop in depths(model)] == linear_decay(layers, 0.5)
    assert {drop.scale for drop in depths(model)} == {"train"}
    assert not depths(plain)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_errors():
    with pytest.raises(ValueError, match="DenseBlock: expected survival to have 3 entries, got 2"):
        DenseBlock(3, 6, 4, survival=(0.5, 0.5))
    with pytest.raises(ValueError, match="DualPathStage: expected survival to be a probability"):
        dual_path(survival=1.5)
    with pytest.raises(ValueError, match="StochasticDepth: expected mode to be one of"):
        dense(survival_mode="row")
    with pytest.raises(ValueError, match="dense_block: expected active to have 2 entries, got 1"):
        layers = [layer_weights(layer) for layer in read_block(DenseBlock(2, 6, 4))]
        fastdense.ops.dense_block(image().float(), layers, active=[True])

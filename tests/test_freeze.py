# SPDX-License-Identifier: Apache-2.0
"""Frozen models: the same numbers, no stale weights, nothing that a copy or a file carries."""

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fastdense
from tests.cases.converted import pair, torchvision_net
from tests.cases.frozen import CHANGES, NETS, check_change_is_seen, frozen_bytes, made, relative, same


@pytest.mark.parametrize("name", NETS)
def test_the_numbers_are_the_same(name):
    plain, fast, x = made(name)
    assert frozen_bytes(fast) > 0
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        same(plain, fast, x)
        same(plain, fast, x[:1])
        torch.set_num_threads(before)
    with torch.inference_mode():
        assert relative(fast(x), plain(x)) <= 1e-10
    assert frozen_bytes(fast) > 0


def test_gradients_are_those_of_the_weights():
    plain, fast, x = made()
    for net in (plain, fast):
        net(x).square().sum().backward()
    for a, b in zip(fast.parameters(), plain.parameters(), strict=True):
        assert relative(a.grad, b.grad) <= 1e-9
    assert frozen_bytes(fast) > 0


def _replace_a_layer(net: nn.Module) -> None:
    torch.manual_seed(5)
    layer = net.features.denseblock1.denselayer2
    layer.conv2 = nn.Conv2d(layer.conv2.in_channels, 6, 3, padding=1, bias=False).double()


@torch.no_grad()
def _write_a_statistic(net: nn.Module) -> None:
    net.features.denseblock2.denselayer1.norm2.running_var.mul_(3)


@torch.no_grad()
def _write_a_weight(net: nn.Module) -> None:
    net.features.transition1.conv.weight.add_(0.5)


THAWS = CHANGES | {
    "a running statistic": _write_a_statistic,
    "a weight of the transition": _write_a_weight,
    "another layer": _replace_a_layer,
}


@pytest.mark.parametrize("change", THAWS)
def test_a_change_is_seen_at_the_next_call(change):
    check_change_is_seen("torchvision", THAWS[change])


@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "plain"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", ["torchvision", "dual path"])
@pytest.mark.filterwarnings("ignore:fastdense. .* runs as plain modules")
def test_a_step_of_one_norm_alone_is_seen(name, momentum, hooked):
    """Its block is in eval mode, and running statistics keep their versions where a step moves them."""
    plain, fast, x = made(name)
    place = "features.conv3_2.c3x3_b.bn" if name == "dual path" else "features.denseblock2.denselayer1.norm2"
    for net in (plain, fast):
        norm = net.get_submodule(place)
        norm.momentum = momentum
        norm.train()
        if hooked:
            norm.register_forward_hook(lambda *_: None)
    same(plain, fast, x)
    for net in (plain, fast):
        net.get_submodule(place)._forward_hooks.clear()
        net.get_submodule(place).eval()
    same(plain, fast, x)


@pytest.fixture
def swaps_parameters():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swaps_parameters")
@pytest.mark.parametrize("change", ["load_state_dict", "load_state_dict(assign=True)"])
def test_loading_may_swap_tensors(change):
    plain, fast, x = made()
    same(plain, fast, x)
    for net in (plain, fast):
        THAWS[change](net)
    assert frozen_bytes(fast) == 0
    same(plain, fast, x)


def check_types(bounds: dict[torch.dtype, float]) -> None:
    """Casts thaw; the model is frozen again in each type."""
    plain, fast, x = made()
    for dtype, bound in bounds.items():
        plain.to(dtype), fast.to(dtype)
        with torch.no_grad():
            assert relative(fast(x.to(dtype)), plain(x.to(dtype))) <= bound
        assert frozen_bytes(fast) == 0
        fastdense.freeze(fast)
        with torch.no_grad():
            assert relative(fast(x.to(dtype)), plain(x.to(dtype))) <= bound
        assert frozen_bytes(fast) > 0


@pytest.mark.usefixtures("swaps_parameters")
def test_casting_may_swap_tensors():
    check_types({torch.float32: 1e-5, torch.float64: 1e-10})


def test_tensors_swapped_by_hand():
    """The old ones live on, and nobody writes to them."""
    plain, fast, x = made()
    same(plain, fast, x)
    others = []
    for net in (plain, fast):
        weight = net.features.denseblock1.denselayer1.conv2.weight
        others.append(nn.Parameter(weight.detach() * 1.5))
        torch.utils.swap_tensors(weight, others[-1])
    same(plain, fast, x)


def test_a_step_on_another_model_is_none_of_its_business():
    """As of a student beside its frozen teacher."""
    _, fast, _ = made()
    _, other, _ = made()
    bytes_before = frozen_bytes(fast)
    CHANGES["a step, fused"](other)
    assert frozen_bytes(fast) == bytes_before > 0 == frozen_bytes(other)


def test_other_types():
    check_types({torch.float32: 1e-5, torch.bfloat16: 0.05})


def test_autocast_computes_in_its_type():
    plain, fast, x = made()
    plain.float(), fastdense.freeze(fast.float())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert relative(fast(x.float()).float(), plain(x.float()).float()) <= 0.05


def test_hooks_are_called():
    plain, fast, x = made()
    seen = []
    fast.features.denseblock1.denselayer1.conv2.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="hook"):
        same(plain, fast, x)
    assert seen == [1]


def test_training_as_if_it_had_not_been_frozen():
    plain, fast, x = made()
    for net in (plain, fast):
        net.train()
        net(x).square().sum().backward()
    for a, b in zip(fast.parameters(), plain.parameters(), strict=True):
        assert relative(a.grad, b.grad) <= 1e-9
    for a, b in zip(fast.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9)


def test_copies_and_files_have_no_packed_weights():
    plain, fast, x = made()
    keys, size = set(plain.state_dict()), len(pickle.dumps(plain))
    assert set(fast.state_dict()) == keys
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    copies = [
        copy.deepcopy(fast),
        copy.copy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(file, weights_only=False),
    ]
    assert len(pickle.dumps(fast)) < 1.2 * size
    assert frozen_bytes(copies[0]) == frozen_bytes(copies[2]) == frozen_bytes(copies[3]) == 0
    for other in copies:
        same(plain, other, x)
    assert frozen_bytes(fast) > 0


def test_thaw_and_restore():
    plain, fast, x = made()
    assert fastdense.thaw(fast) is fast
    assert frozen_bytes(fast) == 0
    same(plain, fast, x)
    fastdense.freeze(fast)
    same(plain, fastdense.restore(fast), x)


def test_threads_share_the_weights():
    _, fast, x = made()
    with torch.no_grad():
        expected = fast(x)

    def call(_):
        with torch.no_grad():
            return fast(x)

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(out, expected) for out in pool.map(call, range(16)))
    assert frozen_bytes(fast) > 0


def test_compiled_and_exported():
    plain, fast, x = made()
    with torch.no_grad():
        assert relative(torch.compile(fast, backend="eager")(x), plain(x)) <= 1e-10
        assert relative(torch.export.export(fast, (x,)).module()(x), plain(x)) <= 1e-10


def test_the_report_has_a_column():
    _, fast, _ = made()
    rows = {row.name: row.frozen_bytes for row in fastdense.report(fast).rows}
    assert rows["features.denseblock1"] > 0 and rows["features.denseblock2"] > 0
    assert "frozen" in str(fastdense.report(fast)).splitlines()[0]
    assert "frozen" not in str(fastdense.report(fastdense.thaw(fast)))


def _block_with(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], object]:
    return lambda net: change(net.features.denseblock1.denselayer1)


def _give_a_bias(layer: nn.Module) -> None:
    layer.conv1.bias = nn.Parameter(torch.full((layer.conv1.out_channels,), 0.1, dtype=torch.float64))


# Edits that stop the use of packed weights, and what undoes them.
UNUSED = {
    "a bias": (_block_with(_give_a_bias), _block_with(lambda layer: setattr(layer.conv1, "bias", None))),
    "another activation": (
        _block_with(lambda layer: setattr(layer, "relu1", nn.GELU())),
        _block_with(lambda layer: setattr(layer, "relu1", nn.ReLU(inplace=True))),
    ),
    "pruning": (
        _block_with(lambda layer: prune.identity(layer.conv2, "weight")),
        _block_with(lambda layer: prune.remove(layer.conv2, "weight")),
    ),
    "a hook of the block": (
        lambda net: net.features.denseblock1.register_forward_hook(lambda *_: None),
        lambda net: net.features.denseblock1._forward_hooks.clear(),
    ),
    "a hook behind it": (
        lambda net: net.features.transition1.conv.register_forward_hook(lambda *_: None),
        lambda net: net.features.transition1.conv._forward_hooks.clear(),
    ),
}


@pytest.mark.parametrize("name", UNUSED)
@pytest.mark.filterwarnings("ignore:fastdense. .* runs as plain modules")
def test_the_report_counts_what_is_of_use(name):
    plain, fast, x = made()
    edit, undo = UNUSED[name]
    for net in (plain, fast):
        edit(net)
    assert [row.frozen_bytes for row in fastdense.report(fast).rows if row.name == "features.denseblock1"] == [0]
    same(plain, fast, x)
    for net in (plain, fast):
        undo(net)
    same(plain, fast, x)
    fastdense.freeze(fast)
    assert [row.frozen_bytes > 0 for row in fastdense.report(fast).rows if row.name == "features.denseblock1"] == [True]


def test_what_cannot_be_frozen_is_refused():
    with pytest.raises(TypeError, match=r"freeze: expected model to be a torch\.nn\.Module, got int"):
        fastdense.freeze(3)
    with pytest.raises(ValueError, match=r"got none; call fastdense\.convert\(model\)"):
        fastdense.freeze(torchvision_net().eval())
    with pytest.raises(ValueError, match=r"in training mode; call model\.eval\(\)"):
        fastdense.freeze(fastdense.convert(torchvision_net()).train())
    group = fastdense.models.densenet_cifar(10, norm="group").eval()
    with pytest.raises(ValueError, match="no block of the model can be frozen: only blocks of batch norms"):
        fastdense.freeze(group)


def test_only_what_can_be_frozen_is():
    torch.manual_seed(0)
    both = nn.ModuleList([fastdense.models.densenet_cifar(10), fastdense.models.densenet_cifar(10, act="gelu")]).eval()
    fastdense.freeze(both)
    kept = {row.name: row.frozen_bytes for row in fastdense.report(both).rows}
    assert all((size > 0) == (name.startswith("0.") and "block" in name) for name, size in kept.items())
    x = torch.randn(2, 3, 32, 32)
    for net in both:
        with torch.no_grad():
            assert relative(net(x), fastdense.restore(copy.deepcopy(net))(x)) <= 1e-4


def test_blocks_with_identity_in_place_of_a_norm_run_as_in_training():
    def without(net: nn.Module) -> None:
        net.features.denseblock1.denselayer1.norm1 = nn.Identity()

    plain, fast = pair(change=without)
    plain.eval(), fastdense.freeze(fast.eval())
    kept = {row.name: row.frozen_bytes for row in fastdense.report(fast).rows}
    assert kept["features.denseblock1"] == 0 < kept["features.denseblock2"]
    same(plain, fast, torch.randn(2, 3, 64, 48, dtype=torch.float64))


def test_train_takes_what_the_class_takes():
    class Own(type(torchvision_net().features.denseblock1)):
        def train(self, mode: bool = True, keep_norms: bool = False):
            self.kept = keep_norms
            return super().train(mode)

    net = torchvision_net()
    net.features.denseblock1.__class__ = Own
    block = fastdense.convert(net).features.denseblock1
    assert block.train(True, keep_norms=True) is block and block.kept and block.training
    assert net.eval() is net and not block.training and not block.kept


def test_what_is_seen_behind_a_stem_has_the_format_of_plain_modules():
    plain, fast = pair()
    x = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    for net in (plain, fast):
        net.eval()
        seen = []
        net.features.pool0.register_forward_hook(lambda _, inputs, out, seen=seen: seen.extend((*inputs, out)))
        with torch.no_grad():
            net(x)
        assert all(t.is_contiguous() for t in seen) and len(seen) == 2
    for net in (plain, fast):
        stem = net.features[:4]
        stem.__class__ = type(net.features)
        with torch.no_grad():
            assert stem(x).is_contiguous()

# SPDX-License-Identifier: Apache-2.0
"""Plans of fused modules: what they own, when they are dropped, and the one name under which a module keeps its own."""

import collections
import copy
import gc
import io
import pickle
import random
import threading
import weakref

import numpy
import pytest
import torch
import torchvision.models.densenet as tv_densenet
from torch import Tensor, nn

import fastdense
from fastdense._C import Fingerprint
from fastdense.fusion.plan.state import STATE, memory_of
from tests.cases.converted import assert_same, fastdense_warnings, fused_calls, pair, randomise, step
from tests.cases.replaced import FAMILIES, OwnLayer

pytestmark = pytest.mark.usefixtures("one_thread")


def block() -> nn.Module:
    return randomise(tv_densenet._DenseBlock(2, 6, 2, 4, 0.0).double())


def converted(**options) -> tuple[nn.Module, Tensor]:
    net = fastdense.convert(nn.Sequential(block()), **options)
    return net, torch.randn(2, 6, 5, 5, dtype=torch.float64)


# --- names ----------------------------------------------------------------------------------------------


class Crowded(nn.Module):
    """A dense block whose attributes, methods and child have names that are handy elsewhere."""

    fused_run = 3

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([OwnLayer(6), OwnLayer(10)])
        self.memory = 2
        self.plain_forward = nn.Identity()
        self.memory_modes = {"a": 1}
        self.name = self.reason = self.state = self.kept = "mine"

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers[: self.memory]:
            x = layer(x)
        return self.plain_forward(x)

    def run_forward(self, x: Tensor) -> Tensor:
        return self.run(x)

    def fall_back(self, x: Tensor) -> Tensor:
        return self.run_forward(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fall_back(x)


@pytest.mark.parametrize("training", [True, False])
def test_names_belong_to_the_users_class(training):
    plain, fast = pair(lambda: randomise(nn.Sequential(Crowded()).double().train(training)))
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == [(2, "none")]
    plain(x)
    handle = fast[0].layers[1].c2.register_forward_hook(lambda *_: None)
    with fastdense_warnings() as messages:
        assert_same(step(fast, x), step(plain, x))
    assert len(messages) == 1 and "has hooks" in messages[0]
    handle.remove()
    assert set(vars(fast[0])) == set(vars(plain[0])) | {STATE}
    assert fast[0].memory == 2 and fast[0].name == "mine"
    fastdense.convert(fast, memory="min")
    assert memory_of(fast[0]) == "min" and fast[0].memory == 2
    assert_same(step(fast, x), step(plain, x))
    fastdense.restore(fast)
    assert type(fast[0]) is Crowded and vars(fast[0]).keys() == vars(plain[0]).keys()
    assert_same(step(fast, x), step(plain, x))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_module_has_one_name_of_its_own(family):
    net = FAMILIES[family].make()
    fused = fastdense.convert(copy.deepcopy(net))
    fused(torch.randn(FAMILIES[family].shape, dtype=torch.float64))
    for plain, module in zip(net.modules(), fused.modules(), strict=True):
        assert set(vars(module)) - set(vars(plain)) <= {STATE}
        # object and nn.Module have all other names already
        assert set(dir(type(module))) - set(dir(type(plain))) <= {"__prepare_scriptable__", "memory"}
    fastdense.restore(fused)
    assert [type(module) for module in fused.modules()] == [type(module) for module in net.modules()]


class Counting:
    def twice(self, x: Tensor) -> Tensor:
        return self(x) * 2


def test_a_class_made_of_a_fused_class_and_another():
    """As facebookresearch/higher makes for every module."""
    net, x = converted()
    expected = net(x)
    net[0].__class__ = type("Patched", (type(net[0]), Counting), {})
    torch.testing.assert_close(net[0].twice(x), expected * 2)
    net[0].denselayer1.conv1.register_forward_hook(lambda *_: None)
    with fastdense_warnings() as messages:
        torch.testing.assert_close(net(x), expected)
    assert len(messages) == 1
    fastdense.restore(net)
    assert type(net[0]) is tv_densenet._DenseBlock
    torch.testing.assert_close(net(x), expected)


# --- copies ---------------------------------------------------------------------------------------------


def through_a_file(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.copy, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), through_a_file]


@pytest.mark.parametrize("make", COPIES, ids=["copy", "deepcopy", "pickle", "file"])
def test_copies_leave_the_plan_behind_and_keep_the_rest(make):
    net, x = converted(memory="min")
    expected = net(x)
    twin = make(net[0])
    assert type(twin) is type(net[0]) and twin.__dict__[STATE] is not net[0].__dict__[STATE]
    assert memory_of(twin) == "min" and twin.__dict__[STATE].kept is None and twin.__dict__[STATE].name == "0"
    assert torch.equal(twin(x), expected)
    fastdense.convert(twin, memory="balanced")
    assert memory_of(net[0]) == "min"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_in_a_network_out_of_a_file_is_seen(family):
    """A process that reads one has other strings there than code has for the names of attributes."""
    made = FAMILIES[family]
    fast, x = fastdense.convert(made.make().eval()), torch.randn(made.shape, dtype=torch.float64)
    for module in fast.modules():
        module.__dict__ = {"".join([*name]): value for name, value in vars(module).items()}
    plain = fastdense.restore(copy.deepcopy(fast))
    assert_same({"out": fast(x)}, {"out": plain(x)})
    for name, old in list(plain.named_parameters()):
        with torch.no_grad():
            new = nn.Parameter(old + 0.5)
        for net in (plain, fast):
            owner, _, attribute = name.rpartition(".")
            setattr(net.get_submodule(owner), attribute, new)
        assert_same({name: fast(x)}, {name: plain(x)})


def test_a_class_with_a_state_of_its_own_is_pickled_by_it():
    net, x = nn.Sequential(WithState()).double(), torch.randn(2, 6, 5, 5, dtype=torch.float64)
    expected = fastdense.convert(net)(x)
    twin = pickle.loads(pickle.dumps(net))
    assert type(twin[0]) is type(net[0]) and twin[0].cache is None
    assert torch.equal(twin(x), expected)


class WithState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([OwnLayer(6), OwnLayer(10)])
        self.cache = threading.Lock()  # which no pickle takes

    def __getstate__(self) -> dict:
        return {**self.__dict__, "cache": None}

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


# --- what a plan keeps alive ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_is_freed_at_once(family):
    net = fastdense.convert(FAMILIES[family].make())
    net(torch.randn(FAMILIES[family].shape, dtype=torch.float64))
    watched = [weakref.ref(next(net.parameters())), *map(weakref.ref, net.modules())]
    gc.collect()
    gc.disable()
    try:
        del net
        assert [ref() for ref in watched if ref() is not None] == []
    finally:
        gc.enable()


def test_a_network_in_a_circle_is_collected():
    net, x = converted()
    net[0].denselayer1.__dict__["parent"] = [net[0]]
    net(x)
    watched = weakref.ref(net[0])
    del net
    gc.collect()
    assert watched() is None


def test_tensors_of_a_graph_are_not_kept():
    net, x = converted()
    expected = net(x)
    scaled = {name: p * 1.5 for name, p in net.named_parameters()}
    watched = [weakref.ref(p) for p in scaled.values()]
    made = torch.func.functional_call(net, scaled, (x,))
    plain = torch.func.functional_call(fastdense.restore(copy.deepcopy(net)), scaled, (x,))
    torch.testing.assert_close(made, plain)
    del scaled, made, plain
    gc.collect()
    assert [ref() for ref in watched if ref() is not None] == []
    torch.testing.assert_close(net(x), expected)


# --- threads --------------------------------------------------------------------------------------------


def test_threads_share_a_module_that_changes():
    net, x = converted()
    net.eval()
    norm = net[0].denselayer1.norm1
    wanted = []
    for eps in (1e-5, 0.5):
        norm.eps = eps
        wanted.append(net(x))
    stop, wrong = threading.Event(), []

    def change():
        while not stop.is_set():
            norm.eps = 0.5 if norm.eps == 1e-5 else 1e-5

    def call():
        for _ in range(50):
            made = net(x)
            if not any(torch.equal(made, each) for each in wanted):
                wrong.append(made)

    changer, callers = threading.Thread(target=change), [threading.Thread(target=call) for _ in range(3)]
    for thread in (changer, *callers):
        thread.start()
    for thread in callers:
        thread.join()
    stop.set()
    changer.join()
    assert wrong == []
    norm.eps = 0.5
    assert torch.equal(net(x), wanted[1])


# --- equivalence checks and generators ------------------------------------------------------------------


def own_blocks(layer: type = OwnLayer) -> nn.Module:
    return nn.Sequential(nn.Sequential(*[layer(6 + 4 * at) for at in range(2)])).double()


def test_a_check_leaves_the_numbers_of_other_threads_alone():
    draws, stop = [], threading.Event()

    def draw():
        while not stop.is_set():
            draws.append((torch.rand(()).item(), random.random()))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        with fastdense_warnings() as messages:
            for _ in range(3):
                fastdense.convert(own_blocks())
    finally:
        stop.set()
        thread.join()
    assert messages == []
    assert len(set(draws)) == len(draws) > 0


class DrawsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.rand_like(grad)


class NumpyLayer(OwnLayer):
    def new(self, x: Tensor) -> Tensor:
        return super().new(x) * float(numpy.random.rand() < 2)


class BackwardLayer(OwnLayer):
    def new(self, x: Tensor) -> Tensor:
        return DrawsInBackward.apply(super().new(x))


DRAWING = [NumpyLayer, BackwardLayer]


@pytest.mark.parametrize("layer", DRAWING)
def test_layers_that_draw_are_refused_before_they_do(layer):
    net = own_blocks(layer)
    states = torch.get_rng_state(), numpy.random.get_state()[1].tolist()
    with fastdense_warnings() as messages:
        fastdense.convert(net)
    assert len(messages) == 1 and "its forward draws random numbers" in messages[0]
    assert torch.equal(torch.get_rng_state(), states[0]) and numpy.random.get_state()[1].tolist() == states[1]


class Changing(OwnLayer):
    """Gives something else each time, by what no fingerprint sees."""

    def new(self, x: Tensor) -> Tensor:
        return super().new(x) * next(ROUNDS)


class Rounds:
    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = 0

    def __next__(self) -> int:
        self.at += 1
        return self.at


ROUNDS = Rounds()


def test_results_that_differ_from_run_to_run_are_refused():
    with fastdense_warnings() as messages:
        fastdense.convert(own_blocks(Changing))
    assert len(messages) == 1 and "its results differ from run to run" in messages[0]


# --- fingerprints ---------------------------------------------------------------------------------------


def test_a_fingerprint_sees_the_order_of_hooks_and_children():
    module = nn.Sequential(nn.ReLU(), nn.Tanh())
    for _ in range(2):
        module[0].register_forward_hook(lambda *_: None)
    fingerprint = Fingerprint((module,), [])
    assert fingerprint.is_kept and fingerprint.holds((module,))
    hooks = module[0]._forward_hooks
    assert isinstance(hooks, collections.OrderedDict)
    hooks.move_to_end(next(iter(hooks)))
    assert not fingerprint.holds((module,)) and fingerprint.difference((module,)) == -1
    hooks.move_to_end(next(iter(hooks)))
    assert fingerprint.holds((module,))
    module._modules["0"] = module._modules.pop("0")
    assert not fingerprint.holds((module,))


def test_a_fingerprint_tells_which_entry_changed():
    names = {"a": 1, "b": [1, {"c": 2}]}
    fingerprint = Fingerprint((), [(names, "a"), (names, "b"), (names, "absent"), (nn.ReLU, "forward")])
    assert fingerprint.difference(()) is None
    names["b"][1]["c"] = 3
    assert fingerprint.difference(()) == 1
    names["b"][1]["c"] = 2
    names["absent"] = 0
    assert fingerprint.difference(()) == 2
    del names["absent"]
    names["d"] = 4
    assert fingerprint.holds(())


@pytest.mark.parametrize("owner", [3, "text", None])
def test_a_fingerprint_refuses_other_owners(owner):
    with pytest.raises(TypeError, match="expected the owner of an entry to be a dict, a class or a cell"):
        Fingerprint((), [(owner, "name")])


def test_what_a_fingerprint_cannot_list_never_holds():
    conv = nn.Conv2d(2, 2, 1)
    conv._parameters["weight"] = conv.weight * 2  # belongs to a graph
    assert not Fingerprint((conv,), []).holds((conv,))
    assert not Fingerprint((conv,), []).is_kept
    inner = nn.ReLU()
    inner._modules["self"] = inner  # a circle
    assert not Fingerprint((inner,), []).is_kept
    assert not Fingerprint((3,), []).is_kept

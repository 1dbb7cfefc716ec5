# SPDX-License-Identifier: Apache-2.0
"""convert and restore on torchvision's and timm's own modules: the same numbers, and what stays plain."""

import contextlib
import copy
import pickle
import subprocess
import sys
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import timm.layers
import timm.models.densenet as timm_densenet
import torch
import torch._dynamo.testing
import torchvision.models.densenet as tv_densenet
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastdense
from tests.test_dense_block import relative

# A block that falls back where the test does not expect it fails the test.
pytestmark = pytest.mark.filterwarnings("error:fastdense")


@pytest.fixture(autouse=True)
def one_thread():
    """The nets are too small for more; on a busy machine threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MEMORY = ("balanced", "min")
FUSED = [(2, "transition"), (3, "norm")]  # operator calls of the small torchvision net: layers and what reads them


def torchvision_net(**options) -> nn.Module:
    sizes = {"growth_rate": 6, "block_config": (2, 3), "num_init_features": 8, "num_classes": 5}
    return randomise(tv_densenet.DenseNet(**sizes | options).double())


def timm_net(**options) -> nn.Module:
    sizes = {"growth_rate": 6, "block_config": (2, 3), "num_classes": 5}
    return randomise(timm_densenet.DenseNet(**sizes | options).double())


NETS = {"torchvision": torchvision_net, "timm": timm_net}


def randomise(net: nn.Module) -> nn.Module:
    """Norms as after some training, so that scale, shift and running statistics matter."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
            if module.running_mean is not None:
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
    return net


def pair(make=torchvision_net, memory="balanced", change=None, when="before", **options):
    """A plain net and a converted one with the same numbers. `change` edits both, before or after the conversion."""
    nets = []
    for convert in (False, True):
        torch.manual_seed(0)
        net = make(**options)
        if change and when == "before":
            change(net)
        if convert:
            assert fastdense.convert(net, memory=memory) is net
        if change and when == "after":
            change(net)
        nets.append(net)
    return nets


def images(batch: int = 2, size: int = 64) -> Tensor:
    """64 pixels and more a channel in the last block: fewer make batch norm ill-conditioned."""
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def step(net: nn.Module, x: Tensor, run=None, names=None, zero: bool = True) -> dict[str, Tensor]:
    """All that a forward and a backward pass make: output, gradients, buffers."""
    x = x.detach().requires_grad_()
    if zero:
        net.zero_grad()
    out = net(x) if run is None else run(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    made = {"out": out.detach(), "input": x.grad}
    made |= {f"grad {name}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return made | {f"buffer {name}": b.clone() for name, b in net.named_buffers()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Relative errors, those of gradients never against less than 1e-4 of the largest gradient.

    Some gradients vanish, as that of a convolution's bias in front of a batch norm, and what is left is rounding.
    """
    assert actual.keys() == expected.keys()
    floor = 1e-4 * max((grad.double().norm() for name, grad in expected.items() if name.startswith("grad")), default=0)
    for name, value in actual.items():
        wanted = expected[name].double()
        assert value.dtype == expected[name].dtype, name
        scale = max(wanted.norm(), floor if name.startswith("grad") else 0, 1e-30)
        assert (value.double() - wanted).norm() <= tolerance * scale, name


def assert_bit_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


class Calls(TorchDispatchMode):
    """Lists the calls of the fused operator as (number of layers, tail), and the elements of z that each keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, str]] = []
        self.kept: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.fastdense.dense_block.default:
            self.made.append((args[3], args[5]))
            self.kept.append(result[4].numel())
        return result


def fused_calls(net: nn.Module, x: Tensor) -> list[tuple[int, str]]:
    with Calls() as calls:
        net(x)
    return calls.made


@contextlib.contextmanager
def fastdense_warnings():
    """Collects the package's warnings."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(w.message) for w in caught if str(w.message).startswith("fastdense")]


@contextlib.contextmanager
def one_warning(*parts: str):
    with fastdense_warnings() as messages:
        yield
    assert len(messages) == 1, messages
    assert all(part in messages[0] for part in parts), messages


def first_layer(net: nn.Module) -> nn.Module:
    return net.features.denseblock1.denselayer1


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_three_training_steps_give_the_same_numbers(make, memory):
    plain, fast = pair(make, memory)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in (plain, fast)]
    for _ in range(3):
        x = images()
        expected, actual = step(plain, x), step(fast, x)
        assert_same(actual, expected)
        for optimizer in optimizers:
            optimizer.step()
    assert_same(fast.state_dict(), plain.state_dict())
    assert fast.features.norm5.num_batches_tracked == 3


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_eval_gives_the_same_numbers(make, memory):
    plain, fast = pair(make, memory)
    x = images()
    assert_same(step(fast.eval(), x), step(plain.eval(), x))


def test_densenet121_gives_the_same_numbers():
    torch.manual_seed(0)
    plain = randomise(tv_densenet.densenet121(num_classes=10).double())
    fast = fastdense.convert(copy.deepcopy(plain))
    x = images(batch=8)
    with Calls() as calls:
        actual = step(fast, x)
    assert calls.made == [(6, "transition"), (12, "transition"), (24, "transition"), (16, "norm")]
    assert_same(actual, step(plain, x))


def test_several_threads_in_the_operator():
    plain, fast = pair()
    x = images()
    expected = step(plain, x)
    torch.set_num_threads(3)
    assert_same(step(fast, x), expected)


def test_every_block_runs_with_what_follows_it_as_one_operator():
    _, fast = pair()
    assert fused_calls(fast, images()) == FUSED
    _, fast = pair(timm_net)
    assert fused_calls(fast, images()) == [(2, "transition"), (3, "norm_relu")]


def test_memory_modes_are_bit_equal():
    x = images()
    made = [step(pair(memory=memory)[1], x) for memory in MEMORY]
    assert_bit_equal(*made)


def test_running_statistics_are_updated_once():
    for memory in MEMORY:
        _, fast = pair(memory=memory)
        fast(images())
        tracked = {int(b) for name, b in fast.named_buffers() if name.endswith("num_batches_tracked")}
        assert tracked == {1}


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_the_libraries_own_checkpointing_does_not_matter(memory_efficient):
    for make in NETS.values():
        plain, _ = pair(make)
        _, fast = pair(make, memory_efficient=memory_efficient)
        x = images()
        assert_same(step(fast, x), step(plain, x))


def test_odd_sizes_and_a_batch_of_one():
    plain, fast = pair()
    for shape in ((1, 3, 70, 61), (3, 3, 33, 47)):
        x = torch.randn(shape, dtype=torch.float64)
        assert_same(step(fast, x), step(plain, x))


# --- what a conversion leaves alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_state_dict_and_parameters_stay_the_same_objects(make):
    net = make()
    keys, parameters, buffers = list(net.state_dict()), list(net.parameters()), list(net.buffers())
    modules = [id(module) for module in net.modules()]
    for change in (fastdense.convert, fastdense.restore):
        change(net)
        assert list(net.state_dict()) == keys
        assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
        assert all(a is b for a, b in zip(net.buffers(), buffers, strict=True))
        assert [id(module) for module in net.modules()] == modules


def test_fused_modules_are_still_instances_of_the_plain_classes():
    _, fast = pair()
    assert isinstance(fast.features.denseblock1, tv_densenet._DenseBlock)
    assert isinstance(fast.features.transition1, tv_densenet._Transition)
    assert isinstance(fast.features, nn.Sequential)


def test_an_existing_optimizer_keeps_working():
    plain, fast = pair()
    fastdense.restore(fast)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in (plain, fast)]
    for index in range(3):
        if index == 1:
            fastdense.convert(fast)
        x = images()
        for net, optimizer in zip((plain, fast), optimizers, strict=True):
            step(net, x)
            optimizer.step()
    assert_same(fast.state_dict(), plain.state_dict())


def test_load_state_dict_both_ways():
    plain, fast = pair()
    x = images()
    for source, target in ((plain, fast), (fast, plain)):
        randomise(source)
        target.load_state_dict(source.state_dict(), strict=True)
        assert_same(step(target.eval(), x), step(source.eval(), x))


def test_old_torchvision_checkpoints_load():
    plain, fast = pair()
    randomise(plain)
    old = OrderedDict(
        (tv_old_key(key), value) for key, value in plain.state_dict().items() if "num_batches_tracked" not in key
    )
    assert "features.denseblock1.denselayer1.norm.1.weight" in old

    class Weights:
        def get_state_dict(self, **options):
            return old

    tv_densenet._load_state_dict(fast, Weights(), progress=False)
    x = images()
    assert_same(step(fast.eval(), x), step(plain.eval(), x))


def tv_old_key(key: str) -> str:
    """`denselayer1.norm1.weight` was `denselayer1.norm.1.weight`."""
    for name in ("norm", "conv"):
        for number in "12":
            if "denselayer" in key:
                key = key.replace(f".{name}{number}.", f".{name}.{number}.")
    return key


# --- convert and restore ---------------------------------------------------------------------------------------------


def test_restore_gives_the_plain_classes_back():
    for make in NETS.values():
        plain, fast = pair(make)
        fastdense.restore(fast)
        assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]
        assert [sorted(vars(m)) for m in fast.modules()] == [sorted(vars(m)) for m in plain.modules()]
        assert fused_calls(fast, images()) == []


def test_converting_and_restoring_twice():
    plain, fast = pair()
    classes = [type(m) for m in fast.modules()]
    fastdense.convert(fast)
    assert [type(m) for m in fast.modules()] == classes
    x = images()
    assert_same(step(fast, x), step(plain, x))
    fastdense.restore(fastdense.restore(fast))
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]
    fastdense.convert(fast)
    assert fused_calls(fast, images()) == FUSED


def test_restore_leaves_other_models_alone():
    net = torchvision_net()
    classes = [type(m) for m in net.modules()]
    assert fastdense.restore(net) is net
    assert [type(m) for m in net.modules()] == classes


def test_converting_again_changes_the_memory_mode():
    plain, fast = pair(memory="balanced")
    x = images()
    kept = {}
    for memory in ("min", "balanced"):
        fastdense.convert(fast, memory=memory)
        with Calls() as calls:
            actual = step(fast, x)
        kept[memory] = sum(calls.kept)
        assert_same(actual, step(plain, x))
    # b = 24 numbers a pixel and layer: 2 layers on 16x16 pixels, 3 on 8x8, batch 2.
    assert kept == {"min": 0, "balanced": 2 * 24 * (2 * 16 * 16 + 3 * 8 * 8)}


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_deepcopy_is_fused_and_independent(make):
    plain, fast = pair(make, memory="min")
    twin = copy.deepcopy(fast)
    assert [type(m) for m in twin.modules()] == [type(m) for m in fast.modules()]
    assert twin.features.denseblock1.memory == "min"
    with torch.no_grad():
        for p in fast.parameters():
            p.zero_()
    x = images()
    assert_same(step(twin, x), step(plain, x))


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_pickle_round_trip_and_restore(make):
    plain, fast = pair(make, memory="min")
    twin = pickle.loads(pickle.dumps(fast))
    x = images()
    assert [type(m) for m in twin.modules()] == [type(m) for m in fast.modules()]
    assert twin.features.denseblock1.memory == "min"
    assert_same(step(twin, x), step(plain, x))
    fastdense.restore(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
    assert_same(step(twin, x), step(plain, x))


def test_torch_save_and_load_in_another_process(tmp_path):
    plain, fast = pair()
    x = images()
    torch.save((fast.eval(), x), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, x = torch.load(sys.argv[1], weights_only=False)\n"
        "import fastdense\n"
        "out = model(x)\n"
        "torch.save((out.detach(), type(model.features.denseblock1).__name__), sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt", tmp_path / "out.pt"], check=True)
    out, name = torch.load(tmp_path / "out.pt")
    assert name == type(fast.features.denseblock1).__name__ != "_DenseBlock"
    assert relative(out, plain.eval()(x)) <= 1e-10


def test_a_model_that_contains_densenets():
    def make():
        body = nn.ModuleDict({"tv": torchvision_net(), "timm": timm_net()})
        return nn.ModuleList([body, nn.Linear(5, 2).double()])

    def run(net, x):
        return net[1](net[0]["tv"](x) + net[0]["timm"](x))

    plain, fast = pair(make)
    x = images()
    with Calls() as calls:
        actual = step(fast, x, run=partial(run, fast))
    assert calls.made == [*FUSED, (2, "transition"), (3, "norm_relu")]
    assert_same(actual, step(plain, x, run=partial(run, plain)))


def test_a_block_or_a_transition_alone():
    def block():
        return randomise(tv_densenet._DenseBlock(3, 8, 4, 6, 0.0).double())

    plain, fast = pair(block)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == [(3, "none")]

    def two():
        return nn.ModuleDict({"block": block(), "transition": tv_densenet._Transition(8, 5).double()})

    plain, fast = pair(two)
    assert_same(step(fast["transition"], x), step(plain["transition"], x))
    assert fused_calls(fast["transition"], x) == [(0, "transition")]


def test_slices_of_the_features_stay_fused():
    plain, fast = pair()
    x = images()
    assert fused_calls(fast.features[:6], x) == FUSED[:1]
    assert relative(fast.features[:6](x), plain.features[:6](x)) <= 1e-10
    assert relative(fast.features[:5](x), plain.features[:5](x)) <= 1e-10


def test_timm_intermediate_features():
    plain, fast = pair(timm_net)
    x = images()
    last, intermediates = fast.forward_intermediates(x)
    expected_last, expected = plain.forward_intermediates(x)
    for actual, wanted in zip([last, *intermediates], [expected_last, *expected], strict=True):
        assert relative(actual, wanted) <= 1e-10


def test_functional_call_uses_the_given_parameters():
    plain, fast = pair()
    other = {name: p.detach() * 1.1 for name, p in plain.named_parameters()}
    x = images()
    actual, expected = (torch.func.functional_call(net.eval(), other, (x,)) for net in (fast, plain))
    assert relative(actual, expected) <= 1e-10


def test_nothing_found_names_what_was_looked_for():
    looked_for = (
        r"torchvision\.models\.densenet\._DenseBlock, timm\..*, monai\.networks\.nets\.densenet\._DenseBlock.*Linear"
    )
    with pytest.raises(ValueError, match=looked_for):
        fastdense.convert(nn.Linear(2, 2))


def test_unknown_memory_mode_changes_nothing():
    net = torchvision_net()
    with pytest.raises(ValueError, match=r"memory to be one of \('balanced', 'min'\), got 'tiny'"):
        fastdense.convert(net, memory="tiny")
    assert type(net.features.denseblock1) is tv_densenet._DenseBlock


# --- hooks -----------------------------------------------------------------------------------------------------------


def forward_hook(module, log):
    return module.register_forward_hook(lambda m, args, out: log.append(out.shape))


def forward_pre_hook(module, log):
    return module.register_forward_pre_hook(lambda m, args: log.append(len(args)))


def full_backward_hook(module, log):
    return module.register_full_backward_hook(lambda m, grad_in, grad_out: log.append(grad_out[0].shape))


def full_backward_pre_hook(module, log):
    return module.register_full_backward_pre_hook(lambda m, grad_out: log.append(grad_out[0].shape))


HOOKS = [forward_hook, forward_pre_hook, full_backward_hook, full_backward_pre_hook]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # a layer's input is a list
@pytest.mark.parametrize(
    ("inner", "register"),
    [(inner, register) for inner in ("denselayer2", "denselayer1.conv1") for register in HOOKS]
    # torch forbids backward hooks in front of in-place modules
    + [(inner, register) for inner in ("denselayer2.norm1", "denselayer1.relu2") for register in HOOKS[:2]],
)
def test_a_hook_inside_a_block_is_called_and_the_block_runs_plain(inner, register):
    plain, fast = pair()
    x = images()
    logs = [], []
    handles = [
        register(net.features.denseblock1.get_submodule(inner), log)
        for net, log in zip((plain, fast), logs, strict=True)
    ]
    with one_warning("features.denseblock1", f"{inner} has hooks"):
        actual = step(fast, x)
        again = step(fast.eval(), x)
    assert_same(actual, step(plain, x))
    assert_same(again, step(plain.eval(), x))
    assert logs[0] == logs[1] and len(logs[0]) == 2
    with fastdense_warnings() as messages:
        assert fused_calls(fast, x) == [(0, "transition"), FUSED[1]]
    assert messages == []
    handles[1].remove()
    assert fused_calls(fast, x) == FUSED


@pytest.mark.parametrize("register", HOOKS)
def test_a_hook_inside_a_transition_is_called_and_the_transition_runs_plain(register):
    plain, fast = pair()
    x = images()
    logs = [], []
    handles = [register(net.features.transition1.conv, log) for net, log in zip((plain, fast), logs, strict=True)]
    with one_warning("features.transition1", "conv has hooks"):
        actual = step(fast, x)
    assert_same(actual, step(plain, x))
    assert logs[0] == logs[1] != []
    with fastdense_warnings():
        assert fused_calls(fast, x) == [(2, "none"), FUSED[1]]
    handles[1].remove()
    assert fused_calls(fast, x) == FUSED


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("name", ["denseblock1", "transition1", "norm5"])
def test_a_hook_on_a_fused_module_itself_is_called_without_a_warning(name, register):
    plain, fast = pair()
    x = images()
    logs = [], []
    handles = [register(getattr(net.features, name), log) for net, log in zip((plain, fast), logs, strict=True)]
    # Not the whole net: torch forbids backward hooks on norm5 in front of its in-place ReLU.
    assert_same(step(fast.features, x), step(plain.features, x))
    assert logs[0] == logs[1] and len(logs[0]) == 1
    split = {"norm5": [(2, "transition"), (3, "none")]}
    assert fused_calls(fast.features, x) == split.get(name, [(2, "none"), (0, "transition"), (3, "norm")])
    handles[1].remove()
    assert fused_calls(fast, x) == FUSED


def test_a_hook_that_changes_the_output_takes_effect():
    plain, fast = pair()
    for net in (plain, fast):
        net.features.denseblock2.register_forward_hook(lambda m, args, out: out * 2)
        first_layer(net).register_forward_hook(lambda m, args, out: out.abs())
    x = images()
    with one_warning("features.denseblock1", "denselayer1 has hooks"):
        assert_same(step(fast, x), step(plain, x))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # a layer's input is a list
@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_global_hooks_see_every_module(register):
    plain, fast = pair()
    for net in (plain, fast):  # torch forbids backward hooks on in-place modules
        for module in net.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
    x = images()
    seen: list[str] = []
    names = {id(m): name for net in (plain, fast) for name, m in net.named_modules()}
    handle = register(lambda module, *_: seen.append(names[id(module)]))
    try:
        with fastdense_warnings() as messages:
            actual = step(fast.features, x)
        fast_seen = seen[:]
        seen.clear()
        expected = step(plain.features, x)
    finally:
        handle.remove()
    assert sorted(fast_seen) == sorted(seen)
    assert_same(actual, expected)
    assert len(messages) == 3 and all("global module hooks" in message for message in messages)
    assert fused_calls(fast, x) == FUSED


def test_a_forward_set_on_an_instance_is_called():
    def change(net):
        for module in (net.features.denseblock2, first_layer(net)):
            forward = module.forward
            module.forward = lambda x, forward=forward: forward(x).abs()

    plain, fast = pair(change=change, when="after")
    x = images()
    with one_warning("features.denseblock1", "denselayer1", "forward of its own"):
        assert_same(step(fast, x), step(plain, x))


# --- what cannot be fused --------------------------------------------------------------------------------------------


class FoldedConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).abs()


class FoldedLayer(tv_densenet._DenseLayer):
    def forward(self, x):
        return super().forward(x).abs()


class FoldedBottleneck(tv_densenet._DenseLayer):
    def bn_function(self, inputs):
        return super().bn_function(inputs).abs()


def set_conv1(net, make=nn.Conv2d, **options):
    old = first_layer(net).conv1
    options = {"kernel_size": 1, "bias": False} | options
    first_layer(net).conv1 = make(old.in_channels, old.out_channels, **options).double()


def set_conv2(net, **options):
    old = first_layer(net).conv2
    options = {"kernel_size": 3, "padding": 1, "bias": False} | options
    first_layer(net).conv2 = nn.Conv2d(old.in_channels, old.out_channels, **options).double()


def set_norm(net, make):
    first_layer(net).norm2 = make(first_layer(net).norm2.num_features).double()


def set_layer(net, make):
    old = first_layer(net)
    layer = make(old.norm1.num_features, 6, 4, 0.0).double()
    layer.load_state_dict(old.state_dict())
    net.features.denseblock1.denselayer1 = layer


def set_wider_first_layer(net):
    block = net.features.denseblock1
    block.denselayer1.conv2 = nn.Conv2d(24, 8, 3, padding=1, bias=False).double()
    block.denselayer2.norm1 = nn.BatchNorm2d(8 + 8).double()
    block.denselayer2.conv1 = nn.Conv2d(8 + 8, 24, 1, bias=False).double()
    transition = net.features.transition1
    transition.norm = nn.BatchNorm2d(8 + 8 + 6).double()
    transition.conv = nn.Conv2d(8 + 8 + 6, transition.conv.out_channels, 1, bias=False).double()


def set_wider_bottleneck(net):
    layer = first_layer(net)
    layer.conv1, layer.norm2 = nn.Conv2d(8, 10, 1, bias=False).double(), nn.BatchNorm2d(10).double()
    layer.conv2 = nn.Conv2d(10, 6, 3, padding=1, bias=False).double()


BLOCK, TRANSITION = "features.denseblock1", "features.transition1"

CHANGES = {
    "weight norm": (lambda n: parametrizations.weight_norm(first_layer(n).conv1), BLOCK, "denselayer1.conv1 is a"),
    "old weight norm": (lambda n: nn.utils.weight_norm(first_layer(n).conv2), BLOCK, "denselayer1.conv2 has hooks"),
    "spectral norm": (lambda n: parametrizations.spectral_norm(first_layer(n).conv2), BLOCK, "denselayer1.conv2 is a"),
    "old spectral norm": (lambda n: nn.utils.spectral_norm(first_layer(n).conv1), BLOCK, "denselayer1.conv1 has hooks"),
    "pruned": (lambda n: prune.l1_unstructured(first_layer(n).conv2, "weight", 0.5), BLOCK, "denselayer1.conv2 has"),
    "conv subclass": (lambda n: set_conv1(n, FoldedConv), BLOCK, "denselayer1.conv1 is a FoldedConv"),
    "conv with bias": (lambda n: set_conv1(n, bias=True), BLOCK, "expected no bias"),
    "grouped conv": (lambda n: set_conv2(n, groups=2), BLOCK, "groups 1"),
    "dilated conv": (lambda n: set_conv2(n, dilation=2, padding="same"), BLOCK, "denselayer1.conv2 is Conv2d"),
    "reflected padding": (lambda n: set_conv2(n, padding_mode="reflect"), BLOCK, "'same' zero padding"),
    "sync batch norm": (lambda n: set_norm(n, nn.SyncBatchNorm), BLOCK, "denselayer1.norm2 is a SyncBatchNorm"),
    "group norm": (lambda n: set_norm(n, partial(nn.GroupNorm, 2)), BLOCK, "denselayer1.norm2 is a GroupNorm"),
    "no norm": (lambda n: set_norm(n, nn.Identity), BLOCK, "denselayer1.norm2 is a Identity"),
    "leaky relu": (lambda n: setattr(first_layer(n), "relu1", nn.LeakyReLU()), BLOCK, "relu1 is a LeakyReLU"),
    "no relu": (lambda n: setattr(first_layer(n), "relu2", nn.Identity()), BLOCK, "denselayer1.relu2 is a Identity"),
    "one dropout": (lambda n: setattr(first_layer(n), "drop_rate", 1.0), BLOCK, "its layers differ in"),
    "extra module": (lambda n: setattr(first_layer(n), "gate", nn.ReLU()), BLOCK, "unknown sub-modules ['gate']"),
    "layer subclass": (lambda n: set_layer(n, FoldedLayer), BLOCK, "denselayer1 is a FoldedLayer"),
    "bottleneck of a subclass": (lambda n: set_layer(n, FoldedBottleneck), BLOCK, "denselayer1 is a FoldedBottleneck"),
    "wider layer": (set_wider_first_layer, BLOCK, "its layers differ in"),
    "wider bottleneck": (set_wider_bottleneck, BLOCK, "its layers differ in"),
    "leaky transition": (lambda n: setattr(n.features.transition1, "relu", nn.LeakyReLU()), TRANSITION, "LeakyReLU"),
    "max pool": (lambda n: setattr(n.features.transition1, "pool", nn.MaxPool2d(2)), TRANSITION, "pool is a MaxPool2d"),
    "other pool": (
        lambda n: setattr(n.features.transition1, "pool", nn.AvgPool2d(3, 2, 1)),
        TRANSITION,
        "expected kernel and stride 2",
    ),
    "divisor": (
        lambda n: setattr(n.features.transition1, "pool", nn.AvgPool2d(2, 2, divisor_override=3)),
        TRANSITION,
        "divisor_override",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_be_fused_runs_plain_with_a_warning(name, when):
    change, module, reason = CHANGES[name]
    x = images()
    with one_warning(module, reason, "stays plain" if when == "before" else "runs as plain modules"):
        plain, fast = pair(change=change, when=when)
        actual = [step(fast, x), step(fast, x), step(fast.eval(), x)]
    expected = [step(plain, x), step(plain, x), step(plain.eval(), x)]
    for mine, theirs in zip(actual, expected, strict=True):
        assert_same(mine, theirs)
    with fastdense_warnings():
        calls = fused_calls(fast.train(), x)
    assert calls == ([(0, "transition")] if module == BLOCK else [(2, "none")]) + FUSED[1:]


class FoldedBlock(tv_densenet._DenseBlock):
    def forward(self, x):
        return super().forward(x).abs()


def test_a_block_class_with_a_forward_of_its_own_is_left_alone():
    def change(net):
        net.features.denseblock1.__class__ = FoldedBlock

    plain, fast = pair(change=change)
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == [(0, "transition"), FUSED[1]]


def test_a_layer_class_that_changes_no_method_is_fused():
    class Layer(tv_densenet._DenseLayer):
        def __init__(self, *args):
            super().__init__(*args)

    plain, fast = pair(change=lambda net: set_layer(net, Layer))
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == FUSED


def test_a_module_added_to_a_transition_after_the_conversion():
    plain, fast = pair(change=lambda net: net.features.transition1.add_module("last", nn.Hardtanh()), when="after")
    x = images()
    with one_warning(TRANSITION, "its modules are norm, relu, conv, pool, last"):
        assert_same(step(fast, x), step(plain, x))


def test_same_padding_and_other_odd_kernels_are_fused():
    def change(net):
        for layer in net.features.denseblock1.children():
            layer.conv2 = nn.Conv2d(24, 6, (5, 1), padding="same", bias=False).double()

    plain, fast = pair(change=change)
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == FUSED


def test_pruning_made_permanent_is_fused_again():
    def change(net):
        prune.l1_unstructured(first_layer(net).conv2, "weight", 0.5)
        prune.remove(first_layer(net).conv2, "weight")

    plain, fast = pair(change=change, when="after")
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == FUSED


def test_sync_batch_norm_of_the_whole_net():
    plain, fast = pair()
    plain, fast = map(nn.SyncBatchNorm.convert_sync_batchnorm, (plain, fast))
    x = images()
    with fastdense_warnings() as messages:
        actual = step(fast, x)
    assert_same(actual, step(plain, x))
    assert [message.split()[1] for message in messages] == [BLOCK, TRANSITION, "features.denseblock2"]
    assert all("is a SyncBatchNorm" in message for message in messages)


@pytest.mark.parametrize("options", [{"act_layer": "silu"}, {"norm_layer": "groupnorm1"}, {"act_layer": "leaky_relu"}])
def test_timm_nets_with_another_activation_or_norm_stay_plain(options):
    with fastdense_warnings() as messages:
        plain, fast = pair(timm_net, block_config=(1, 1), **options)
        x = images()
        assert_same(step(fast, x), step(plain, x))
    assert [message.split()[1] for message in messages] == [BLOCK, "features.denseblock2", TRANSITION]
    assert fused_calls(fast, x) == []


def test_timm_blur_pool_in_the_stem_is_no_obstacle():
    plain, fast = pair(timm_net, aa_layer=timm.layers.BlurPool2d, stem_type="deep")  # densenetblur121d
    x = images()
    assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == [(2, "transition"), (3, "norm_relu")]


def test_timm_blur_pool_in_a_transition_stays_plain():
    x = images()
    with one_warning(TRANSITION, "pool is a BlurPool2d"):
        plain, fast = pair(timm_net, aa_layer=timm.layers.BlurPool2d, stem_type="deep", aa_stem_only=False)
        assert_same(step(fast, x), step(plain, x))
    assert fused_calls(fast, x) == [(2, "none"), (3, "norm_relu")]


def test_warnings_of_convert_point_at_its_caller():
    for change in (CHANGES["leaky relu"][0], CHANGES["leaky transition"][0]):
        net = torchvision_net()
        change(net)
        with pytest.warns(UserWarning, match="stays plain") as caught:
            fastdense.convert(net)
        assert caught[0].filename == __file__


# --- norms and frozen parts ------------------------------------------------------------------------------------------


def norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def replace_norms(net: nn.Module, **options) -> None:
    for module in list(net.modules()):
        for name, inner in list(module.named_children()):
            if type(inner) is nn.BatchNorm2d:
                setattr(module, name, nn.BatchNorm2d(inner.num_features, **options).double())
    randomise(net)


def freeze_all_norms(net):
    for norm in norms(net):
        norm.eval()


def freeze_some_norms(net):
    for norm in norms(net)[1::2]:
        norm.eval()


def freeze_one_block(net):
    net.features.denseblock1.eval()


def unequal_eps(net):
    for index, norm in enumerate(norms(net)):
        norm.eps = 1e-5 * 3**index


def unequal_momentum(net):
    for index, norm in enumerate(norms(net)):
        norm.momentum = None if index % 3 == 0 else index / 20


def stop_tracking(net):
    for norm in norms(net)[::2]:
        norm.track_running_stats = False


def only_weights_of_norms(net):
    for norm in norms(net):
        norm.bias = None


NORMS = {
    "all frozen": freeze_all_norms,
    "some frozen": freeze_some_norms,
    "one block frozen": freeze_one_block,
    "momentum None": lambda net: replace_norms(net, momentum=None),
    "unequal momentum": unequal_momentum,
    "not affine": lambda net: replace_norms(net, affine=False),
    "no running statistics": lambda net: replace_norms(net, track_running_stats=False),
    "running statistics no longer tracked": stop_tracking,
    "unequal eps": unequal_eps,
    "no shift": only_weights_of_norms,
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", NORMS)
def test_norms(name, memory):
    plain, fast = pair(memory=memory, change=NORMS[name], when="after")
    x = images()
    for _ in range(2):
        assert_same(step(fast, x), step(plain, x))
    assert_same(step(fast.eval(), x), step(plain.eval(), x))
    assert fused_calls(fast, x) == FUSED


def test_running_statistics_without_a_counter_stay_plain():
    def change(net):
        first_layer(net).norm1.num_batches_tracked = None

    plain, fast = pair(change=change, when="after")
    x = images()
    with one_warning(BLOCK, "denselayer1.norm1 has running statistics without num_batches_tracked"):
        assert_same(step(fast, x), step(plain, x))


def freeze(net: nn.Module, frozen) -> None:
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not frozen(name))


@pytest.mark.parametrize(
    "frozen",
    [
        lambda name: True,
        lambda name: "conv" in name,
        lambda name: "norm" in name,
        lambda name: "denselayer1" in name or "transition" in name,
        lambda name: "classifier" not in name,
    ],
    ids=["all", "convolutions", "norms", "first layers and transitions", "all but the classifier"],
)
def test_parameters_without_gradient(frozen):
    plain, fast = pair(change=lambda net: freeze(net, frozen))
    x = images()
    actual = step(fast, x)
    assert_same(actual, step(plain, x))
    assert {name for name in actual if name.startswith("grad")} == {
        f"grad {name}" for name, _ in fast.named_parameters() if not frozen(name)
    }


def test_input_without_gradient():
    plain, fast = pair()
    x = images()
    for net in (plain, fast):
        net(x).square().sum().backward()
    for (name, mine), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert relative(mine.grad, theirs.grad) <= 1e-10, name


# --- dropout ---------------------------------------------------------------------------------------------------------


def dropout_block(drop_rate: float) -> nn.Module:
    return randomise(tv_densenet._DenseBlock(2, 8, 4, 16, drop_rate).double())


def test_dropout_drops_and_scales_as_torch_does():
    rate = 0.3
    plain, fast = pair(dropout_block, drop_rate=rate)
    x = torch.randn(4, 8, 20, 20, dtype=torch.float64)
    plain.denselayer1.drop_rate = 0.0
    kept = plain(x)[:, 8:24] / (1 - rate)
    first = fast(x)[:, 8:24]
    dropped = first == 0
    deviation = (rate * (1 - rate) / first.numel()) ** 0.5
    assert abs(dropped.double().mean() - rate) < 5 * deviation
    per_channel = dropped.double().mean((0, 2, 3))
    assert (per_channel - rate).abs().max() < 5 * deviation * 16**0.5
    assert relative(first, kept.masked_fill(dropped, 0)) <= 1e-10
    second = fast(x)[:, 24:] == 0
    assert abs(second.double().mean() - rate) < 5 * deviation
    both = ((fast(x)[:, 8:24] == 0) & dropped).double().mean()
    assert abs(both - rate**2) < 5 * deviation, "two calls share a mask"


def test_dropout_is_the_identity_in_eval():
    plain, fast = pair(drop_rate=0.5)
    x = images()
    assert_same(step(fast.eval(), x), step(plain.eval(), x))


def test_dropout_follows_the_seed():
    _, fast = pair(drop_rate=0.5)
    x = images()
    made = []
    for seed, memory in ((1, "balanced"), (1, "min"), (2, "balanced")):
        fastdense.convert(fast, memory=memory)
        torch.manual_seed(seed)
        result = step(fast, x)
        made.append({name: value for name, value in result.items() if not name.startswith("buffer")})
    assert_bit_equal(made[0], made[1])
    assert not torch.equal(made[0]["out"], made[2]["out"])


def test_dropout_of_everything():
    plain, fast = pair(drop_rate=1.0)
    x = images()
    assert_same(step(fast, x), step(plain, x))


def test_dropout_is_read_from_timm_nets():
    _, fast = pair(timm_net, proj_drop_rate=0.4)
    blocks = []
    fast.features.denseblock1.register_forward_hook(lambda m, args, out: blocks.append(out[:, 12:]))
    fast(images())
    assert abs((blocks[0] == 0).double().mean() - 0.4) < 0.05


# --- autograd --------------------------------------------------------------------------------------------------------


def test_gradients_accumulate():
    plain, fast = pair()
    x, y = images(), images()
    for net in (plain, fast):
        step(net, x)
    assert_same(step(fast, y, zero=False), step(plain, y, zero=False))


def test_backward_twice_through_one_graph():
    plain, fast = pair()
    x = images()
    grads = []
    for net in (plain, fast):
        out = net(x)
        out.sum().backward(retain_graph=True)
        out.square().sum().backward()
        grads.append({name: p.grad for name, p in net.named_parameters()})
    assert_same(grads[1], grads[0])


@pytest.mark.parametrize("memory", MEMORY)
def test_two_forwards_before_one_backward(memory):
    plain, fast = pair(memory=memory)
    x, y = images(), images(3)
    made = []
    for net in (plain, fast):
        made.append(step(net, x, run=lambda x, net=net: net(x).sum(0) * net(y).sum(0) + net(x * 2).sum(0)))
    assert_same(made[1], made[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("memory", MEMORY)
def test_an_outer_checkpoint_changes_nothing_and_counts_once(memory, use_reentrant):
    plain, fast = pair(memory=memory)
    x = images()

    def run(x):
        return fast.classifier(checkpoint(fast.features, x, use_reentrant=use_reentrant).relu().mean((2, 3)))

    actual = step(fast, x, run=run)
    expected = step(plain, x)
    assert actual["buffer features.norm5.num_batches_tracked"] == 1
    # The stem's own norm is plain and counted twice by a checkpoint, as it is without fastdense.
    stem = [name for name in actual if name.startswith("buffer features.norm0")]
    for name in stem:
        del actual[name], expected[name]
    assert_same(actual, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_an_outer_checkpoint_repeats_the_dropout(use_reentrant):
    _, fast = pair(drop_rate=0.5)
    _, twin = pair(drop_rate=0.5)
    x = images()
    torch.manual_seed(7)
    expected = step(fast.features, x)
    torch.manual_seed(7)
    actual = step(twin.features, x, run=partial(checkpoint, twin.features, use_reentrant=use_reentrant))
    grads = [{n: v for n, v in made.items() if not n.startswith("buffer")} for made in (actual, expected)]
    assert_bit_equal(*grads)


def test_inference_mode():
    for training in (True, False):
        plain, fast = pair()
        x = images()
        with torch.inference_mode():
            out, expected = fast.train(training)(x), plain.train(training)(x)
        assert out.is_inference()
        assert relative(out, expected) <= 1e-10
        assert_same(fast.state_dict(), plain.state_dict())
        assert_same(step(fast, x), step(plain, x))


def test_no_grad_keeps_nothing():
    _, fast = pair()
    x = images()
    saved = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t), Calls() as calls:
        out = fast(x)
    assert calls.kept == [0, 0]
    assert saved == [] and out.grad_fn is None


def test_in_place_edit_of_a_block_raises_in_backward():
    _, fast = pair()
    fast.features.denseblock1.register_forward_hook(lambda m, args, out: out.mul_(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fast(images()).sum().backward()


def test_in_place_edits_of_the_features_are_allowed():
    plain, fast = pair()
    x = images()
    made = [step(net.features, x, run=lambda x, net=net: net.features(x).mul_(2).relu_()) for net in (fast, plain)]
    assert_same(*made)


def test_double_backward_raises():
    _, fast = pair()
    x = images().requires_grad_()
    (grad,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.square().sum().backward()


def test_two_threads_at_once():
    plain, fast = pair()
    plain.eval()
    fast.eval()
    inputs = [images(2 + index % 3) for index in range(8)]
    expected = [step(copy.deepcopy(plain), x) for x in inputs]

    def run(x):
        net = copy.deepcopy(fast)
        return fast(x).detach(), step(net, x)

    with ThreadPoolExecutor(2) as pool:
        for (out, made), wanted in zip(pool.map(run, inputs), expected, strict=True):
            assert relative(out, wanted["out"]) <= 1e-10
            assert_same(made, wanted)


# --- dtypes and layouts ----------------------------------------------------------------------------------------------


def float32_pair(make):
    """A float64 net for the truth, and a plain and two converted float32 ones."""
    exact = make()
    plain = copy.deepcopy(exact).float()
    return exact, plain, [fastdense.convert(copy.deepcopy(plain), memory=memory) for memory in MEMORY]


def assert_no_worse(actual: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], factor: float = 2):
    """Error against float64 at most twice torch's own, for the output and for all gradients together."""
    names = [name for name in exact if name.startswith("grad")]

    def errors(made):
        gradients = [torch.cat([grads[n].double().flatten() for n in names]) for grads in (made, exact)]
        return relative(made["out"].double(), exact["out"]), relative(*gradients)

    for mine, theirs in zip(errors(actual), errors(plain), strict=True):
        assert mine <= factor * theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_autocast(make, dtype):
    exact, plain, fast = float32_pair(make)
    x = images(4)
    truth = step(exact, x)

    def run(net):
        return step(net, x.float(), run=torch.autocast("cpu", dtype=dtype)(net))

    expected, actual = run(plain), [run(net) for net in fast]
    assert actual[0]["out"].dtype == expected["out"].dtype == dtype
    assert {n: v.dtype for n, v in actual[0].items()} == {n: v.dtype for n, v in expected.items()}
    assert_bit_equal(*actual)
    assert_no_worse(actual[0], expected, truth)


def test_autocast_of_inner_outputs_has_the_plain_dtype():
    _, plain, (fast, _) = float32_pair(torchvision_net)
    dtypes = []
    for net in (plain, fast):
        seen = []
        for name in ("denseblock1", "transition1", "denseblock2", "norm5"):
            getattr(net.features, name).register_forward_hook(lambda m, args, out, seen=seen: seen.append(out.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            net(images().float())
        dtypes.append(seen)
    assert dtypes[0] == dtypes[1] == [torch.bfloat16] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nets_of_another_dtype(dtype):
    exact, plain, fast = float32_pair(torchvision_net)
    x = images(4)
    truth = step(exact, x)
    expected = step(plain.to(dtype), x.to(dtype))
    actual = [step(net.to(dtype), x.to(dtype)) for net in fast]
    assert {n: v.dtype for n, v in actual[0].items()} == {n: v.dtype for n, v in expected.items()}
    assert_bit_equal(*actual)
    assert_no_worse(actual[0], expected, truth)


def test_double_after_the_conversion():
    plain = torchvision_net().float()
    fast = fastdense.convert(copy.deepcopy(plain)).double()
    plain.double()
    x = images()
    assert_same(step(fast, x), step(plain, x))


def test_norms_kept_in_float32():
    exact, plain, fast = float32_pair(torchvision_net)
    x = images(4)
    truth = step(exact, x)
    for net in (plain, *fast):
        net.bfloat16()
        for norm in norms(net):
            norm.float()
    expected, actual = step(plain, x.bfloat16()), [step(net, x.bfloat16()) for net in fast]
    assert {n: v.dtype for n, v in actual[0].items()} == {n: v.dtype for n, v in expected.items()}
    assert_no_worse(actual[0], expected, truth)


def test_channels_last_model_and_input():
    plain, fast = pair()
    x = images()
    expected = step(plain, x)
    fast.to(memory_format=torch.channels_last)
    assert_same(step(fast, x.to(memory_format=torch.channels_last)), expected)


LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 8, 10, 8, dtype=torch.float64),
    "channels last": lambda: torch.randn(2, 8, 10, 8, dtype=torch.float64).to(memory_format=torch.channels_last),
    "slice of a bigger tensor": lambda: torch.randn(4, 11, 20, 9, dtype=torch.float64)[::2, 2:10, ::2, 1:],
    "transposed": lambda: torch.randn(2, 8, 8, 10, dtype=torch.float64).transpose(2, 3),
    "expanded batch": lambda: torch.randn(1, 8, 10, 8, dtype=torch.float64).expand(2, -1, -1, -1),
    "expanded channels": lambda: torch.randn(2, 1, 10, 8, dtype=torch.float64).expand(-1, 8, -1, -1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_inputs_of_any_layout(name):
    def make():
        modules = [tv_densenet._DenseBlock(2, 8, 4, 6, 0.0), tv_densenet._Transition(20, 10)]
        return randomise(nn.Sequential(*modules, tv_densenet._DenseBlock(1, 10, 4, 6, 0.0)).double())

    plain, fast = pair(make)
    x = LAYOUTS[name]()
    before = x.clone()
    assert_same(step(fast, x), step(plain, x))
    assert torch.equal(x, before)
    assert fused_calls(fast, x) == [(2, "transition"), (1, "none")]


def test_empty_batch():
    plain, fast = pair()
    x = images(0)
    assert_same(step(fast.eval(), x), step(plain.eval(), x))
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        fast.train()(x)


def test_wrong_inputs_raise_as_plain_ones_do():
    block = tv_densenet._DenseBlock(2, 8, 4, 6, 0.0)
    plain, fast = block, fastdense.convert(copy.deepcopy(block))
    for shape in ((2, 7, 6, 6), (8, 6, 6), (2, 8, 6)):
        for net in (plain, fast):
            with pytest.raises((RuntimeError, ValueError)):
                net(torch.randn(shape))


# --- torch.compile ---------------------------------------------------------------------------------------------------


class Graphs:
    """A backend that keeps the graphs that it compiles."""

    def __init__(self, backend: str) -> None:
        self.compile = torch._dynamo.lookup_backend(backend)
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return self.compile(graph, inputs)

    def fused_calls(self) -> list[int]:
        operators = (torch.ops.fastdense.dense_block, torch.ops.fastdense.dense_block.default)
        return [sum(node.target in operators for node in graph.graph.nodes) for graph in self.graphs]


def test_compile_with_changing_batch_size():
    torch._dynamo.reset()
    plain, fast = pair(memory="min")
    backend = Graphs("aot_eager")
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    for batch in (2, 3, 4):
        x = images(batch)
        assert_same(step(fast, x, run=compiled), step(plain, x))
    assert backend.fused_calls() == [2, 2], "one graph for the first size, one for all others"
    fast.eval()
    plain.eval()
    assert_same(step(fast, x, run=compiled), step(plain, x))


def test_compile_timm_with_dropout():
    torch._dynamo.reset()
    _, fast = pair(timm_net, proj_drop_rate=0.5)
    backend = Graphs("aot_eager")
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    x = images()
    outs = [step(fast, x, run=compiled)["out"] for _ in range(2)]
    assert not torch.equal(*outs)
    assert backend.fused_calls() == [2]
    assert fast.features.norm5.num_batches_tracked == 2


def test_compile_with_inductor():
    torch._dynamo.reset()

    def make():
        modules = [tv_densenet._DenseBlock(1, 4, 2, 2, 0.0), tv_densenet._Transition(6, 3)]
        return randomise(nn.Sequential(*modules).double())

    plain, fast = pair(make)
    compiled = torch.compile(fast, fullgraph=True)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for _ in range(2):
        assert_same(step(fast, x, run=compiled), step(plain, x))

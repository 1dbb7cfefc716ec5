# SPDX-License-Identifier: Apache-2.0
"""Whatever is changed on a module, or put in the place of code, is seen at the next call: plain numbers, and why."""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastdense
from fastdense.plain.residual_dense_block import PlainResidualDenseBlock
from fastdense.plain.sr_dense_block import PlainSRDenseBlock
from tests.cases import replaced
from tests.cases.converted import assert_same, fastdense_warnings, step
from tests.cases.random_block import relative
from tests.cases.replaced import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")


class Operators(TorchDispatchMode):
    """Counts the library's block operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "fastdense" and "update" not in str(func)
        return func(*args, **(kwargs or {}))


def fused_operators(net: nn.Module, x: Tensor) -> int:
    with Operators() as operators, fastdense_warnings():
        net(x)
    return operators.count


def nets(family: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A plain network, one to convert with the same numbers, and an input."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(FAMILIES[family].make().eval())
    return *made, torch.randn(FAMILIES[family].shape, dtype=torch.float64)


def halved(result: Any) -> Any:
    return tuple(map(halved, result)) if isinstance(result, tuple) else result * 0.5


@contextlib.contextmanager
def put(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value in the place of what ``owner`` itself holds, or inherits."""
    inherits = isinstance(owner, type) and name not in vars(owner)
    old = None if inherits else getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if inherits:
            delattr(owner, name)
        else:
            setattr(owner, name, old)


@contextlib.contextmanager
def halving(owner: Any, name: str) -> Iterator[None]:
    """A function whose results are half of what they were."""
    old = getattr(owner, name)
    with put(owner, name, lambda *args, **kwargs: halved(old(*args, **kwargs))):
        yield


def out(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        made = net(x)
    return torch.cat(made, 1) if isinstance(made, tuple) else made


PATCHES = [(family, index) for family, known in FAMILIES.items() for index in range(len(known.code))]
NAMES = [
    f"{family}: {getattr(owner, '__name__', owner)}.{name}"
    for family in FAMILIES
    for owner, name in FAMILIES[family].code
]


@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize(("family", "index"), PATCHES, ids=NAMES)
def test_code_put_in_the_place_of_a_function_runs(family, index, when):
    owner, name = FAMILIES[family].code[index]
    plain, fast, x = nets(family)
    usual = out(plain, x)
    if when == "after":
        fastdense.convert(fast)
        assert relative(out(fast, x), usual) <= 1e-10
    with fastdense_warnings() as messages, halving(owner, name):
        if when == "before":
            fastdense.convert(fast)
        expected, actual = out(plain, x), out(fast, x)
        assert relative(expected, usual) > 1e-3, "the function makes no numbers here"
    assert relative(actual, expected) <= 1e-10
    reasons = "has been replaced", "its results differ from those", "expected", "fails when called"
    assert any(reason in message for message in messages for reason in reasons), messages
    assert relative(out(fast, x), usual) <= 1e-10
    if when == "after":
        assert fused_operators(fast, x) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_are_read_once(family, monkeypatch):
    _, fast, x = nets(family)
    fastdense.convert(fast)
    out(fast, x)
    count = fused_operators(fast, x)
    assert count > 0

    def read_again(*_):
        raise AssertionError("a plan is read again although nothing has changed")

    monkeypatch.setattr("fastdense.fusion.base.keep", read_again)
    monkeypatch.setattr("fastdense.fusion.sequential.keep", read_again)
    assert fused_operators(fast, x) == count


# --- what an instance is given --------------------------------------------------------------------------


def last(net: nn.Module, *kinds: type) -> Any:
    return [module for module in net.modules() if isinstance(module, kinds)][-1]


def last_conv(net: nn.Module) -> Any:
    return [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Conv3d) and set(m.kernel_size) == {3}][-1]


def circular(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padded = F.pad(x, (1, 1) * (x.dim() - 2), mode="circular")
    return (F.conv2d if x.dim() == 4 else F.conv3d)(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


def give_conv_forward(net: nn.Module) -> None:
    conv = last_conv(net)
    conv._conv_forward = types.MethodType(circular, conv)


def give_forward(net: nn.Module) -> None:
    conv = last_conv(net)
    conv.forward = lambda x, forward=conv.forward: forward(x) * 0.5


def set_padding_mode(net: nn.Module) -> None:
    conv = last_conv(net)
    conv.padding_mode = "circular"
    conv._reversed_padding_repeated_twice = [1, 1] * (conv.weight.dim() - 2)


class Halving(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class Halving3d(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


def change_class(net: nn.Module) -> None:
    conv = last_conv(net)
    conv.__class__ = Halving if isinstance(conv, nn.Conv2d) else Halving3d


def replace_child(net: nn.Module) -> None:
    conv = last_conv(net)
    name = next(name for name, module in net.named_modules() if module is conv)
    net.set_submodule(name, nn.Sequential(conv, nn.Tanh()))


def add_hook(net: nn.Module) -> None:
    last_conv(net).register_forward_hook(lambda module, args, result: result * 0.5)


def add_pre_hook(net: nn.Module) -> None:
    last_conv(net).register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def reparametrize(net: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(last_conv(net))
    last_conv(net).parametrizations.weight.original0.data.mul_(2)


def new_weight(net: nn.Module) -> None:
    conv = last_conv(net)
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def other_data(net: nn.Module) -> None:
    conv = last_conv(net)
    conv.weight.data = conv.weight.data * 2


def train(net: nn.Module) -> None:
    net.train()


def remove_affine(net: nn.Module) -> None:
    norm = last(net, nn.modules.batchnorm._BatchNorm)
    norm.weight = None
    norm.bias = None


def change_eps(net: nn.Module) -> None:
    last(net, nn.modules.batchnorm._BatchNorm).eps = 0.5


def train_one_norm(net: nn.Module) -> None:
    last(net, nn.modules.batchnorm._BatchNorm).train()


def forget_statistics(net: nn.Module) -> None:
    norm = last(net, nn.modules.batchnorm._BatchNorm)
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    norm.track_running_stats = False


def give_norm_forward(net: nn.Module) -> None:
    norm = last(net, nn.modules.batchnorm._BatchNorm)
    norm.forward = lambda x, forward=norm.forward: forward(x) * 0.5


WARNS: dict[Callable[[nn.Module], None], str] = {
    give_conv_forward: "has a _conv_forward of its own",
    give_forward: "has a forward of its own",
    set_padding_mode: "zero padding",
    change_class: "Halving",
    replace_child: "",
    add_hook: "has hooks",
    add_pre_hook: "has hooks",
    reparametrize: "",
    give_norm_forward: "has a forward of its own",
}
FUSED = [new_weight, other_data, train, remove_affine, change_eps, train_one_norm, forget_statistics]
WITHOUT_NORMS = ("residual dense", "hand-written residual dense", "growing dense")


def needs_norms(change: Callable[[nn.Module], None]) -> bool:
    return "norm" in change.__name__ or change in (remove_affine, change_eps, forget_statistics, train)


CHANGES = [
    (family, change)
    for family in FAMILIES
    for change in [*WARNS, *FUSED]
    if not (family in WITHOUT_NORMS and needs_norms(change))
]


@pytest.mark.parametrize(
    ("family", "change"), CHANGES, ids=[f"{family}: {change.__name__}" for family, change in CHANGES]
)
def test_a_change_is_seen_at_the_next_call(family, change):
    plain, fast, x = nets(family)
    usual = out(plain, x)
    fastdense.convert(fast)
    assert relative(out(fast, x), usual) <= 1e-10
    with fastdense_warnings() as messages:
        for net in (plain, fast):
            change(net)
        expected, actual = out(plain, x), out(fast, x)
    assert relative(expected, usual) > 1e-4, "the change makes no difference"
    assert relative(actual, expected) <= 1e-9
    if change in WARNS:
        assert any(WARNS[change] in message for message in messages), messages
    for name, buffer in fast.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_after_each_change_of_mode(family):
    plain, fast, x = nets(family)
    fastdense.convert(fast)
    for mode in (True, False, True):
        assert_same(step(fast.train(mode), x), step(plain.train(mode), x))
        for net in (plain, fast):
            net.requires_grad_(mode)


# --- modes and globals ----------------------------------------------------------------------------------


class HalvesConvolutions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 0.5 if func in (F.conv2d, F.conv3d) else result


@pytest.mark.parametrize("family", FAMILIES)
def test_a_function_mode_sees_the_functions_of_plain_modules(family):
    plain, fast, x = nets(family)
    fastdense.convert(fast)
    usual = out(fast, x)
    with fastdense_warnings() as messages, HalvesConvolutions():
        expected, actual = out(plain, x), out(fast, x)
    assert relative(expected, usual) > 1e-3
    assert relative(actual, expected) <= 1e-10
    assert any("a HalvesConvolutions watches" in message for message in messages)
    assert relative(out(fast, x), usual) <= 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_a_default_device_changes_nothing(family):
    _, fast, x = nets(family)
    fastdense.convert(fast)
    count = fused_operators(fast, x)
    torch.set_default_device("cpu")
    try:
        with fastdense_warnings() as messages:
            assert fused_operators(fast, x) == count > 0
            with torch.device("cpu"):
                assert fused_operators(fast, x) == count
    finally:
        torch.set_default_device(None)
    assert messages == []


@pytest.mark.parametrize("family", FAMILIES)
def test_global_hooks_come_and_go(family):
    plain, fast, x = nets(family)
    fastdense.convert(fast)
    usual, count = out(fast, x), fused_operators(fast, x)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, result: result * 0.5 if isinstance(module, nn.Conv2d | nn.Conv3d) else None
    )
    with fastdense_warnings() as messages:
        expected, actual = out(plain, x), out(fast, x)
        handle.remove()
    assert relative(expected, usual) > 1e-3
    assert relative(actual, expected) <= 1e-10
    assert any("global module hooks" in message for message in messages)
    assert fused_operators(fast, x) == count


# --- code of users --------------------------------------------------------------------------------------


def test_a_function_of_the_users_module_is_replaced(monkeypatch):
    plain, fast, x = nets("hand-written")
    fastdense.convert(fast)
    usual = out(fast, x)
    monkeypatch.setattr(replaced, "join", lambda x, new: torch.cat([x, new * 0.5], 1))
    with fastdense_warnings() as messages:
        assert relative(out(fast, x), out(plain, x)) <= 1e-10
    assert relative(out(plain, x), usual) > 1e-3
    assert "its results differ from those" in messages[0]
    monkeypatch.undo()
    assert relative(out(fast, x), usual) <= 1e-10
    assert fused_operators(fast, x) == 1


def test_the_code_of_a_function_is_replaced():
    plain, fast, x = nets("hand-written")
    fastdense.convert(fast)
    usual = out(fast, x)
    with put(replaced.join, "__code__", (lambda x, new: torch.cat([x, new * 0.5], 1)).__code__):
        with fastdense_warnings() as messages:
            assert relative(out(fast, x), out(plain, x)) <= 1e-10
        assert relative(out(plain, x), usual) > 1e-3
    assert "its results differ from those" in messages[0]


def test_the_code_of_a_function_of_torch_is_replaced():
    plain, fast, x = nets("torchvision")
    fastdense.convert(fast)
    usual = out(fast, x)
    with put(nn.ReLU.forward, "__code__", (lambda self, input: input.tanh()).__code__):
        with fastdense_warnings() as messages:
            assert relative(out(fast, x), out(plain, x)) <= 1e-10
        assert relative(out(plain, x), usual) > 1e-3
    assert any("ReLU.forward has been replaced" in message for message in messages)
    assert relative(out(fast, x), usual) <= 1e-10


def test_a_property_on_a_class_comes_before_the_parameter():
    plain, fast, x = nets("torchvision")
    fastdense.convert(fast)
    usual = out(fast, x)
    with put(nn.Conv2d, "weight", property(lambda self: self._parameters["weight"] * 0.5)):
        with fastdense_warnings() as messages:
            assert relative(out(fast, x), out(plain, x)) <= 1e-10
        assert relative(out(plain, x), usual) > 1e-3
    assert any("Conv2d.weight has been replaced" in message for message in messages)


def test_an_object_of_settings_changes():
    class Settings:
        scale = 1.0

    class Scaled(replaced.OwnLayer):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.settings = Settings()
            self.settings.scale = 1.0

        def new(self, x: Tensor) -> Tensor:
            return super().new(x) * self.settings.scale

    net = nn.Sequential(nn.Sequential(*[Scaled(6 + 4 * at) for at in range(2)])).double().eval()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    usual = out(net, x)
    fastdense.convert(net)
    assert fused_operators(net, x) == 1
    net[0][1].settings.scale = 0.5
    with fastdense_warnings() as messages:
        made = out(net, x)
    assert relative(made[:, :10], usual[:, :10]) <= 1e-10
    assert relative(made[:, 10:], usual[:, 10:] * 0.5) <= 1e-10
    assert "its results differ from those" in messages[0]


def test_a_parameter_that_watches_functions():
    class Watching(nn.Parameter):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **(kwargs or {}))
            return result * 0.5 if func is F.conv2d else result

    plain, fast, x = nets("torchvision")
    fastdense.convert(fast)
    out(fast, x)
    for net in (plain, fast):
        last_conv(net).weight = Watching(last_conv(net).weight.detach())
    with fastdense_warnings() as messages:
        assert relative(out(fast, x), out(plain, x)) <= 1e-10
    assert any("has a Watching" in message for message in messages)


# --- subclasses of this library's own blocks ------------------------------------------------------------


@pytest.mark.parametrize(
    ("plain_class", "arguments"), [(PlainResidualDenseBlock, (6, 4, 2)), (PlainSRDenseBlock, (6, 4, 3))]
)
def test_a_subclass_with_another_forward_is_tried(plain_class, arguments):
    class Other(plain_class):
        def forward(self, x):
            return super().forward(x) * 2

    net, x = nn.Sequential(Other(*arguments)).double(), torch.randn(2, 6, 5, 5, dtype=torch.float64)
    usual = out(net, x)
    with fastdense_warnings() as messages:
        fastdense.convert(net)
    assert relative(out(net, x), usual) <= 1e-10
    assert "its results differ" in messages[0]

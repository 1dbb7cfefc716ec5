# SPDX-License-Identifier: Apache-2.0
"""Reads dense blocks of unknown classes: inferred from the widths of their layers, then checked numerically."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdense.fusion.channel_order import check_groups
from fastdense.fusion.checks import (
    CONVS,
    NORMS,
    SAMPLE_NORMS,
    NotFusible,
    check_conv,
    check_dense_norm,
    check_no_global_hooks,
    check_no_hooks,
    class_name,
    forward_of,
)
from fastdense.fusion.dense_layers import Layer, check_alike, check_norms_fit, is_activation, read_activation
from fastdense.fusion.equivalence import (
    Dropouts,
    NoRandomNumbers,
    Situation,
    Trial,
    double_copy,
    isolated,
    masked,
    plain_forward,
    random_input,
)
from fastdense.fusion.plan.outcome import code_of, tried
from fastdense.ops import Activation
from fastdense.reference import activate

_LISTS = (nn.ModuleList, nn.ModuleDict)


_WITH_NUMBERS = NORMS + SAMPLE_NORMS + CONVS


_KNOWN = (*_WITH_NUMBERS, nn.Dropout, nn.Identity)


# Modules that may have no parameters, by name, as libraries have their own.
_ACTIVATIONS = frozenset(nn.modules.activation.__all__)


# What layers without an activation module may call, the likeliest first.
_FUNCTIONS = (
    Activation("relu"),
    Activation("leaky_relu", 0.01),
    Activation("leaky_relu", 0.1),
    Activation("leaky_relu", 0.2),
    Activation("silu"),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("elu", 1.0),
    Activation("selu"),
    Activation("mish"),
    Activation("hardswish"),
    Activation("relu6"),
    Activation("softplus", 1.0, 20.0),
    Activation("tanh"),
    Activation("sigmoid"),
)


class InferredBlock(NamedTuple):
    """The layers of a block in order; ``prepends_features``: new features stand in front of earlier ones.

    ``heads`` children of a sequence run in front of them.
    """

    layers: list[Layer]
    prepends_features: bool
    heads: int = 0


class _Form(NamedTuple):
    prepends_features: bool
    drop_rate: float
    function: Activation | None  # of layers without an activation module
    moves_twice: bool  # see Step


def container_of_layers(module: nn.Module) -> nn.Module:
    """What holds the layers: the module, or its only child with norms or convolutions if that is a list or sequence."""
    children = [child for child in module.children() if _has_numbers(child)]
    if len(children) == 1 and type(children[0]) in (nn.Sequential, *_LISTS):
        return children[0]
    return module


def _has_numbers(module: nn.Module) -> bool:
    return any(isinstance(inner, _WITH_NUMBERS) for inner in module.modules())


def _layer_modules(module: nn.Module, heads: int = 0) -> Iterator[tuple[str, nn.Module]]:
    container = container_of_layers(module)
    prefix = "".join(f"{name}." for name, child in module.named_children() if child is container)
    children = list(container.named_children())[heads:]
    return ((prefix + name, child) for name, child in children if _has_numbers(child))


def count_layers(module: nn.Module) -> int:
    return len(list(_layer_modules(module, count_heads(module))))


def count_heads(module: nn.Module) -> int:
    """How many children of a sequence run in front of others that look like the layers of a dense block, to its end."""
    if not isinstance(module, nn.Sequential):
        return 0
    children = list(module.children())
    behind = (at for at in range(len(children) - 1) if _has_numbers(children[at]))
    return next((at for at in behind if _grow(child for child in children[at:] if _has_numbers(child))), 0)


def looks_like_dense_block(module: nn.Module) -> bool:
    """Whether the children are two layers or more, with norms, that read ``C0, C0 + k_1, C0 + k_1 + k_2 ...`` channels.

    The last convolution of layer ``l`` makes ``k_l``, or where all are equal any of its convolutions. There are three
    layers or more but where the last one of each makes the same ``k``. Modules that run one behind the other never look
    like this.
    """
    if forward_of(module) in (None, nn.Module.forward):  # a list
        return False
    return _grow(layer for _, layer in _layer_modules(module))


def _grow(layers: Iterable[nn.Module]) -> bool:
    starts, convs = [], []
    for layer in layers:
        found = [inner for inner in layer.modules() if isinstance(inner, CONVS)]
        if not found or layer is found[0] or not any("Norm" in type(inner).__name__ for inner in layer.modules()):
            return False
        starts.append(found[0].in_channels)
        convs.append([conv.out_channels for conv in found])
    steps = [behind - before for before, behind in itertools.pairwise(starts)]
    made = [channels[-1] for channels in convs]
    if steps == made[:-1] and len(set(made)) == 1:
        return len(made) > 1
    if steps == made[:-1]:  # stages of other networks double their channels
        return len(made) > 2 and steps != starts[:-1]
    # The last convolution may be one of an attention to the new features.
    return len(steps) > 1 and len(set(steps)) == 1 and all(steps[0] in channels for channels in convs)


def read_inferred_block(module: nn.Module) -> InferredBlock:
    """Reads the layers, whatever their modules are called, and checks the block once (:mod:`.equivalence`)."""
    return _read(module, 0)


def read_inferred_layers(module: nn.Module) -> InferredBlock:
    """Reads the layers at the end of a sequence whose first children may do something else."""
    return _read(module, count_heads(module))


def _read(module: nn.Module, heads: int) -> InferredBlock:
    check_no_global_hooks()
    layers = _read_layers(module, heads)
    form = tried(module, lambda module: _try_out(_behind(module, heads)))
    rate = 0.0
    if form.drop_rate > 0:
        modes = {inner.training for _, inner in _modules_behind(module, heads) if not isinstance(inner, _WITH_NUMBERS)}
        if len(modes) > 1:
            raise NotFusible("it has dropout, and only some of its modules are in training mode")
        rate = form.drop_rate if modes == {True} else 0.0
    layers = check_alike([layer._replace(drop_rate=rate) for layer in _with_function(layers, form.function)])
    if form.prepends_features:
        check_groups(layer.norm1 for layer in layers)
    return InferredBlock(layers, form.prepends_features, heads)


def _with_function(layers: list[Layer], function: Activation | None) -> list[Layer]:
    return layers if function is None else [layer._replace(act1=function, act2=function) for layer in layers]


def _behind(module: nn.Module, heads: int) -> nn.Module:
    return nn.Sequential(*list(module.children())[heads:]) if heads > 0 else module


def _modules_behind(module: nn.Module, heads: int) -> list[tuple[str, nn.Module]]:
    """All modules inside, without the first children; an activation of several layers in each."""
    first = [name for name, _ in module.named_children()][:heads]
    seen: set[int] = set()
    found = []
    for name, inner in module.named_modules(remove_duplicate=False):
        if name.partition(".")[0] not in first and (id(inner) not in seen or _activates(inner)):
            found.append((name, inner))
        seen.add(id(inner))
    return found


def _read_layers(module: nn.Module, heads: int = 0) -> list[Layer]:
    modules = _modules_behind(module, heads)
    foreign = dict.fromkeys(class_name(inner) for _, inner in modules if _is_foreign(inner))
    if foreign:
        raise NotFusible(
            f"its layers have {', '.join(foreign)}: expected only batch, instance and group norms, activations, "
            "convolutions and dropout"
        )
    parts: dict[str, list[tuple[str, nn.Module]]] = {name: [] for name, _ in _layer_modules(module, heads)}
    if not parts:
        raise NotFusible("it has no layers")
    depth = 1 + next(iter(parts)).count(".")
    owners: dict[int, str] = {}
    for name, inner in module.named_modules(remove_duplicate=False):
        layer = ".".join(name.split(".")[:depth])
        if layer in parts and isinstance(inner, _WITH_NUMBERS) and owners.setdefault(id(inner), layer) != layer:
            raise NotFusible(f"{owners[id(inner)]} and {layer} share a {class_name(inner)}")
    shared: list[tuple[str, nn.Module]] = []  # activations of the block, which layers may call
    for name, inner in modules:
        if inner is not module:
            check_no_hooks(inner, name)
        layer = ".".join(name.split(".")[:depth])
        if isinstance(inner, _WITH_NUMBERS):
            parts[layer].append((name, inner))
        elif _activates(inner):
            parts.get(layer, shared).append((name, inner))
        elif _has_own(inner):
            raise NotFusible(f"{name or 'it'} has parameters of its own")
    return check_alike([_read_layer(part, shared, name) for name, part in parts.items()])


def _has_own(module: nn.Module) -> bool:
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return any(tensor is not None for tensor in tensors)


def _is_foreign(module: nn.Module) -> bool:
    if isinstance(module, _KNOWN) or is_activation(module):
        return False
    return type(module).__name__ in _ACTIVATIONS or (not module._modules and _has_own(module))


def _read_layer(found: list[tuple[str, nn.Module]], shared: list[tuple[str, nn.Module]], name: str) -> Layer:
    parts = [(where, part) for where, part in found if not _activates(part)]
    kinds = [isinstance(part, CONVS) for _, part in parts]
    if kinds not in ([False, True], [False, True, False, True]):
        given = ", ".join(class_name(part) for _, part in parts)
        raise NotFusible(f"{name} is {given}: expected norm, convolution, or norm, 1x1 convolution, norm, convolution")
    norm1 = check_dense_norm(parts[0][1], parts[0][0], any_activation=False)
    conv1 = norm2 = None
    if len(parts) > 2:
        conv1 = check_conv(parts[1][1], parts[1][0], 1, bias=True)
        norm2 = check_dense_norm(parts[2][1], parts[2][0], any_activation=False)
    conv2 = check_conv(parts[-1][1], parts[-1][0], None, bias=True)
    # In the order of the norms, or one for both; the equivalence check decides.
    own = [(where, part) for where, part in found if _activates(part)]
    acts = [read_activation(part, where) for where, part in own or shared] or [Activation()]
    layer = Layer(norm1, conv1, norm2, conv2, 0.0, None, acts[0], acts[-1])
    check_norms_fit(layer, parts[0][0], parts[-2][0])
    return layer


def _activates(module: nn.Module) -> bool:
    return is_activation(module) and not isinstance(module, nn.Identity)


def _try_out(module: nn.Module) -> _Form:
    """Compares outputs, gradients and running statistics with the definition's, in training and in eval mode."""
    with isolated():
        twin = double_copy(module)
        layers = _read_layers(twin)
        x = random_input(layers[0].conv2, (layers[0].conv1 or layers[0].conv2).in_channels)
        rates: dict[bool, set[float]] = {True: set(), False: set()}
        trial = Trial(twin, x, lambda: _watch(rates[twin.training]))
        before = code_of(twin)
        made = trial.steps(plain_forward(twin))
        if code_of(twin) != before:
            raise NotFusible("its forward changes its attributes")
        if len(rates[True]) > 1 or rates[False]:
            raise NotFusible("its dropout has more than one rate, or is active in eval mode")
        drop_rate = max(rates[True], default=0.0)
        functions = [None] if any(_activates(inner) for inner in twin.modules()) else _FUNCTIONS
        for function, prepends_features in itertools.product(functions, (False, True)):
            form = _Form(prepends_features, drop_rate, function, made[Situation(True)].moves_twice)
            if trial.agrees(_definition(twin, layers, form), made):
                return form
    raise NotFusible(
        "its results differ from those of a dense block: norm, activation and convolution on all earlier features"
    )


def _definition(twin: nn.Module, layers: list[Layer], form: _Form) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        for layer in _with_function(layers, form.function):
            new = activate(layer.norm1(x), layer.act1)
            if layer.conv1 is not None and layer.norm2 is not None:
                new = activate(layer.norm2(layer.conv1(new)), layer.act2)
            new = layer.conv2(new)
            new = masked(new) if form.drop_rate > 0 and twin.training else new
            x = torch.cat([new, x] if form.prepends_features else [x, new], 1)
        return x

    return forward


@contextlib.contextmanager
def _watch(rates: set[float]) -> Iterator[None]:
    with Dropouts(rates), NoRandomNumbers():
        yield

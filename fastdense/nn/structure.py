# SPDX-License-Identifier: Apache-2.0
"""Reads plain modules: which ones form a dense block, and what keeps one from being fused.

Everything is read again at each call, so that hooks, replaced sub-modules, frozen norms and changed parameters are
seen when they matter. A fused operator does not call the inner modules; what relies on such calls makes
:class:`NotFusible`, and the caller runs the plain modules instead.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.modules.module as global_hooks
from torch import nn

from fastdense.nn.stochastic_depth import StochasticDepth
from fastdense.ops import LayerWeights, NormWeights, TailWeights

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# timm's norms with an activation inside.
_NORMS_WITH_ACTIVATION = ("BatchNormAct2d", "SyncBatchNormAct")
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Classes that are known to concatenate: blocks, and layers of norm1 ... conv2. By name, as no library need be loaded.
BLOCKS = (
    ("torchvision.models.densenet", "_DenseBlock"),
    ("timm.models.densenet", "DenseBlock"),
    ("monai.networks.nets.densenet", "_DenseBlock"),
    ("fastdense.nn.dense_block", "PlainDenseBlock"),
)
_LAYERS = (
    ("torchvision.models.densenet", "_DenseLayer"),
    ("timm.models.densenet", "DenseLayer"),
    ("monai.networks.nets.densenet", "_DenseLayer"),
    ("fastdense.nn.dense_block", "DenseLayer"),
)
# Their methods that make the numbers.
_METHODS = (
    "forward",
    "features",
    "branch",
    "bn_function",
    "bottleneck_fn",
    "any_requires_grad",
    "call_checkpoint_bottleneck",
)
_TRANSITIONS = (["norm", "relu", "conv", "pool"], ["norm", "conv", "pool"])


class NotFusible(Exception):
    """The reason why a block has to run as plain modules."""


class NotFusibleInTraining(NotFusible):
    """A reason that goes away in eval mode: the block is converted, and runs plainly while it trains."""


class Layer(NamedTuple):
    """The modules of a dense layer; conv1 and norm2 are None without a bottleneck."""

    norm1: nn.BatchNorm2d
    conv1: nn.Conv2d | None
    norm2: nn.BatchNorm2d | None
    conv2: nn.Conv2d
    drop_rate: float
    depth: StochasticDepth | None = None


class Tail(NamedTuple):
    """The modules that read a finished block: norm and 1x1 of a transition, or a last norm alone."""

    norm: nn.BatchNorm2d
    conv: nn.Conv2d | None
    relu: bool


def is_quiet(module: nn.Module) -> bool:
    """Whether calling ``module`` runs its class's forward and nothing else."""
    state = module.__dict__
    return (
        not any(state.get(hooks) for hooks in _HOOKS)
        and "parametrizations" not in state["_modules"]
        and "forward" not in state
    )


def check_quiet(module: nn.Module, name: str) -> None:
    if not is_quiet(module):
        raise NotFusible(f"{name} has hooks, a parametrization or a forward of its own")


def runs_as(module: nn.Module, known: tuple[tuple[str, str], ...]) -> bool:
    """Whether ``module`` is of a known class, or of a subclass that leaves its methods alone."""
    for base in type(module).__mro__:
        if (base.__module__, base.__qualname__) in known:
            return True
        if any(method in base.__dict__ for method in _METHODS):
            return False
    return False


def is_transition(module: nn.Module) -> bool:
    """Whether the children are exactly norm, (relu), conv, pool."""
    return list(module.__dict__["_modules"]) in _TRANSITIONS


def check_no_global_hooks() -> None:
    """Those of a ``ModuleTracker`` only note where a module begins and ends: they count operations by module."""
    for hooks in (
        global_hooks._global_forward_hooks,
        global_hooks._global_forward_pre_hooks,
        global_hooks._global_backward_hooks,
        global_hooks._global_backward_pre_hooks,
    ):
        for hook in hooks.values():
            if type(getattr(hook, "__self__", None)).__module__ != "torch.utils.module_tracker":
                raise NotFusible("global module hooks are installed")


def child(module: nn.Module, name: str) -> nn.Module | None:
    return module.__dict__["_modules"].get(name)


def class_name(module: object) -> str:
    """With its package where a class of another has the name of one of torch.nn, as in quantisation."""
    kind = type(module)
    borrowed = getattr(nn, kind.__name__, kind) is not kind
    return f"{kind.__module__}.{kind.__name__}" if borrowed else kind.__name__


def check_conv(
    conv: Any, name: str, kernel: int | None, *, stride: int = 1, grouped: bool = False, bias: bool = False
) -> nn.Conv2d:
    """A convolution, padded by half its kernel; ``kernel`` None: any odd one; ``bias``: whether it may have one."""
    if type(conv) not in CONVS:
        raise NotFusible(f"{name} is a {class_name(conv)}, not a Conv1d, Conv2d or Conv3d")
    check_quiet(conv, name)
    plain = (
        (conv.bias is None or bias)
        and (conv.groups == 1 or grouped)
        and all(s == stride for s in conv.stride)
        and all(d == 1 for d in conv.dilation)
        and conv.padding_mode == "zeros"
        and all(k % 2 == 1 and (kernel is None or k == kernel) for k in conv.kernel_size)
        and (
            conv.padding == "same" and stride == 1
            if isinstance(conv.padding, str)
            else all(p == k // 2 for p, k in zip(conv.padding, conv.kernel_size, strict=True))
        )
    )
    if not plain:
        wanted = ("" if bias else "no bias, ") + f"stride {stride}, " + ("" if grouped else "groups 1, ")
        raise NotFusible(f"{name} is {conv}: expected {wanted}'same' zero padding")
    return conv


def has_fused_relu(norm: nn.Module) -> bool:
    """Whether ``norm`` is timm's norm with a plain ReLU inside."""
    return (
        type(norm).__name__ in _NORMS_WITH_ACTIVATION
        and type(child(norm, "act")) is nn.ReLU
        and type(child(norm, "drop")) is nn.Identity
    )


def check_norm(norm: Any, name: str) -> Any:
    """A batch norm whose statistics can be taken, or used, and moved without a call of it."""
    if norm is None or (type(norm) not in NORMS and not has_fused_relu(norm)):
        raise NotFusible(f"{name} is a {class_name(norm)}, not a BatchNorm with ReLU")
    check_quiet(norm, name)
    for inner in norm.__dict__["_modules"].values():
        check_quiet(inner, f"{name}'s activation")
    if norm.running_mean is not None and norm.num_batches_tracked is None:
        raise NotFusible(f"{name} has running statistics without num_batches_tracked")
    return norm


def check_norm_relu(module: nn.Module, norm: str, relu: str, where: str) -> Any:
    """A batch norm followed by ReLU: two modules, or one that does both."""
    found = check_norm(child(module, norm), f"{where}{norm}")
    activation = child(module, relu)
    if has_fused_relu(found) == (activation is not None):
        raise NotFusible(f"{where}{norm} is not followed by one ReLU")
    if activation is not None:
        if type(activation) is not nn.ReLU:
            raise NotFusible(f"{where}{relu} is a {type(activation).__name__}, not a ReLU")
        check_quiet(activation, f"{where}{relu}")
    return found


def read_layer(module: Any, name: str) -> Layer:
    """Reads norm1, relu1, conv1, norm2, relu2, conv2 (conv1 and norm2 may be missing together)."""
    check_quiet(module, name)
    if not runs_as(module, _LAYERS):
        raise NotFusible(f"{name} is a {type(module).__name__}, not a known dense layer")
    where = f"{name}."
    known = ["norm1", "relu1", "conv1", "norm2", "relu2", "conv2"]
    if list(module.__dict__["_modules"]) == ["layers"]:  # MONAI's layer is a sequence of these, and perhaps a dropout
        module, where = child(module, "layers"), f"{name}.layers."
        check_quiet(module, f"{name}.layers")
        if type(module) is not nn.Sequential or list(module._modules)[:6] != known:
            raise NotFusible(f"{name}.layers is not a sequence of {', '.join(known)}")
        known = [*known, "dropout"]
    children = {key for key, value in module.__dict__["_modules"].items() if value is not None}
    depth = read_stochastic_depth(module, where)
    unknown = children - set(known) - ({"stochastic_depth"} if depth is not None else set())
    if unknown:
        raise NotFusible(f"{name} has unknown sub-modules {sorted(unknown)}")
    norm1 = check_norm_relu(module, "norm1", "relu1", where)
    conv1, norm2 = None, None
    if "conv1" in children:
        conv1 = check_conv(child(module, "conv1"), f"{where}conv1", 1)
        norm2 = check_norm_relu(module, "norm2", "relu2", where)
    conv2 = check_conv(child(module, "conv2"), f"{where}conv2", None)
    return Layer(norm1, conv1, norm2, conv2, _drop_rate(module, where), depth)


def read_stochastic_depth(module: Any, where: str) -> StochasticDepth | None:
    """What leaves a layer or block out at random; only this library's own have one."""
    depth = child(module, "stochastic_depth")
    if type(depth) is not StochasticDepth:
        return None
    check_quiet(depth, f"{where}stochastic_depth")
    if depth.draws_samples:
        raise NotFusibleInTraining(f"{where}stochastic_depth drops single samples")
    return depth


def draw_factors(depths: Iterable[StochasticDepth | None]) -> list[float | torch.Tensor]:
    """One mini-batch's factors of layers, in order; 0 for those left out."""
    return [1.0 if depth is None else depth.draw() for depth in depths]


def scaled(weight: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """A last convolution whose output is multiplied by ``factor``."""
    if isinstance(factor, torch.Tensor):
        return weight * factor.to(weight)
    return weight if factor in (0, 1) else weight * factor


def _drop_rate(module: Any, where: str) -> float:
    """Of an attribute, or of a module behind the layer; 0 outside training."""
    dropout: Any = child(module, "dropout")
    if dropout is None:
        return float(getattr(module, "drop_rate", 0.0)) if module.training else 0.0
    check_quiet(dropout, f"{where}dropout")
    if not dropout.training or dropout.p == 0:
        return 0.0
    if type(dropout) is not nn.Dropout:
        raise NotFusibleInTraining(f"{where}dropout is a {type(dropout).__name__}, not a Dropout of single features")
    return float(dropout.p)


def read_block(module: nn.Module) -> list[Layer]:
    """Reads the layers of a dense block, in order."""
    check_no_global_hooks()
    return check_alike([read_layer(layer, name) for name, layer in module.named_children()])


def check_alike(layers: list[Layer]) -> list[Layer]:
    if len({_common(layer) for layer in layers}) > 1:
        raise NotFusible("its layers differ in growth rate, bottleneck, kernel or drop_rate")
    return layers


def _common(layer: Layer) -> tuple[Any, ...]:
    """What all layers of a fused block share: bottleneck, growth rate and kernel, drop rate."""
    width = layer.conv1.weight.shape[0] if layer.conv1 is not None else 0
    growth, _, *kernel = layer.conv2.weight.shape
    return (width, growth, *kernel, layer.drop_rate)


def read_transition(module: nn.Module) -> Tail:
    """Reads norm, relu, conv, pool of a transition."""
    check_no_global_hooks()
    if not is_transition(module):
        raise NotFusible(f"its modules are {', '.join(module._modules)}: expected norm, relu, conv, pool")
    norm = check_norm_relu(module, "norm", "relu", "")
    conv = check_conv(child(module, "conv"), "conv", 1)
    pool: Any = child(module, "pool")
    if type(pool) not in _POOLS:
        raise NotFusible(f"pool is a {type(pool).__name__}, not an average pool")
    check_quiet(pool, "pool")
    kernel, stride, padding = (
        {size} if isinstance(size, int) else set(size) for size in (pool.kernel_size, pool.stride, pool.padding)
    )
    if not (kernel == stride == {2} and padding == {0}) or pool.ceil_mode:
        raise NotFusible(f"pool is {pool}: expected kernel and stride 2 without padding")
    if getattr(pool, "divisor_override", None) is not None:
        raise NotFusible("pool has a divisor_override")
    return Tail(norm, conv, True)


def read_last_norm(module: nn.Module) -> Tail:
    """Reads a batch norm behind the last block, with or without a ReLU inside."""
    check_no_global_hooks()
    return Tail(check_norm(module, "norm"), None, has_fused_relu(module))


def norms_of(layers: list[Layer], tail: Tail | None) -> Iterator[nn.BatchNorm2d]:
    """All norms in the order of the operator's arguments."""
    for layer in layers:
        yield layer.norm1
        if layer.norm2 is not None:
            yield layer.norm2
    if tail is not None:
        yield tail.norm


def norm_weights(norm: Any) -> NormWeights:
    # As in nn.BatchNorm: the running statistics normalise in eval mode, where there are any.
    mean = var = None
    if not norm.training and norm.running_mean is not None:
        mean, var = norm.running_mean, norm.running_var
        if torch.is_grad_enabled():  # saved for backward; a training step in between may move the buffers
            mean, var = mean.clone(), var.clone()
    return NormWeights(norm.weight, norm.bias, mean, var, norm.eps)


def layer_weights(layer: Layer, factor: float | torch.Tensor = 1.0) -> LayerWeights:
    return LayerWeights(
        norm_weights(layer.norm1),
        layer.conv1.weight if layer.conv1 is not None else None,
        norm_weights(layer.norm2) if layer.norm2 is not None else None,
        scaled(layer.conv2.weight, factor),
    )


def tail_weights(tail: Tail) -> TailWeights:
    conv = tail.conv.weight if tail.conv is not None else None
    return TailWeights(norm_weights(tail.norm), conv, tail.relu)

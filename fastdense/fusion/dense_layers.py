# SPDX-License-Identifier: Apache-2.0
"""Reads which plain modules form a dense block, a transition or a last norm, and their weights."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fastdense.fusion.checks import (
    INSTANCE_NORMS,
    SAMPLE_NORMS,
    NotFusible,
    NotFusibleInTraining,
    check_conv,
    check_dense_norm,
    check_fits,
    check_no_global_hooks,
    check_no_hooks,
    child,
    class_name,
    fused_activation,
    is_known_class,
    per_axis,
)
from fastdense.ops import Activation, LayerWeights, NormWeights, TailWeights
from fastdense.plain.stochastic_depth import StochasticDepth

_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


# Classes that are known to concatenate: blocks, and layers of norm1 ... conv2. By name, as no library need be loaded.
BLOCKS = (
    ("torchvision.models.densenet", "_DenseBlock"),
    ("timm.models.densenet", "DenseBlock"),
    ("monai.networks.nets.densenet", "_DenseBlock"),
    ("fastdense.plain.dense_block", "PlainDenseBlock"),
)


_LAYERS = (
    ("torchvision.models.densenet", "_DenseLayer"),
    ("timm.models.densenet", "DenseLayer"),
    ("monai.networks.nets.densenet", "_DenseLayer"),
    ("fastdense.plain.dense_block", "DenseLayer"),
)


_TRANSITIONS = (["norm", "relu", "conv", "pool"], ["norm", "conv", "pool"])


_Reader = Callable[[Any], Activation]


def _named(name: str) -> _Reader:
    return lambda module: Activation(name)


def _gelu(module: Any) -> Activation:
    if module.approximate not in ("none", "tanh"):
        raise NotFusible(f"{module} has an approximation that is not known")
    return Activation("gelu" if module.approximate == "none" else "gelu_tanh")


def _celu(module: Any) -> Activation:
    if not module.alpha > 0:
        raise NotFusible(f"{module} has an alpha that is not above 0")
    return Activation("celu", float(module.alpha))


def _softplus(module: Any) -> Activation:
    if not module.beta > 0:
        raise NotFusible(f"{module} has a beta that is not above 0")
    return Activation("softplus", float(module.beta), float(module.threshold))


def _prelu(module: Any) -> Activation:
    return Activation("prelu", weight=module.weight)


def _swish(module: Any) -> Activation:
    if module.alpha != 1:
        raise NotFusible(f"Swish has alpha {module.alpha}, expected 1")
    return Activation("silu")


_TORCH: dict[str, _Reader] = {
    "ReLU": _named("relu"),
    "ReLU6": _named("relu6"),
    "LeakyReLU": lambda module: Activation("leaky_relu", float(module.negative_slope)),
    "PReLU": _prelu,
    "ELU": lambda module: Activation("elu", float(module.alpha)),
    "CELU": _celu,
    "SELU": _named("selu"),
    "SiLU": _named("silu"),
    "GELU": _gelu,
    "Hardswish": _named("hardswish"),
    "Mish": _named("mish"),
    "Softplus": _softplus,
    "Tanh": _named("tanh"),
    "Sigmoid": _named("sigmoid"),
}


# By module and name, as no library need be loaded.
_READERS: dict[tuple[str, str], _Reader] = {
    **{("torch.nn.modules.activation", name): reader for name, reader in _TORCH.items()},
    ("torch.nn.modules.linear", "Identity"): _named("identity"),
    ("timm.layers.activations", "GELU"): _named("gelu"),
    ("timm.layers.activations", "GELUTanh"): _named("gelu_tanh"),
    ("timm.layers.activations", "PReLU"): _prelu,
    ("timm.layers.activations", "Tanh"): _named("tanh"),
    ("timm.layers.activations", "Sigmoid"): _named("sigmoid"),
    ("monai.networks.blocks.activation", "Swish"): _swish,
    ("monai.networks.blocks.activation", "MemoryEfficientSwish"): _named("silu"),
    ("monai.networks.blocks.activation", "Mish"): _named("mish"),
}


def _reader(module: object) -> _Reader | None:
    kind = type(module)
    return _READERS.get((kind.__module__, kind.__qualname__))


def is_activation(module: object) -> bool:
    """Whether :func:`read_activation` knows the class."""
    return _reader(module) is not None


def read_activation(module: nn.Module, name: str) -> Activation:
    """Raises NotFusible for other classes than those listed, and for settings that the operator does not have."""
    reader = _reader(module)
    if reader is None:
        raise NotFusible(f"{name} is a {class_name(module)}, which is no activation that the operator runs")
    check_no_hooks(module, name)
    return reader(module)


class Layer(NamedTuple):
    """The modules of a dense layer; conv1 and norm2 are None without a bottleneck."""

    norm1: Any
    conv1: nn.Conv2d | None
    norm2: Any
    conv2: nn.Conv2d
    drop_rate: float
    depth: StochasticDepth | None = None
    act1: Activation = Activation()
    act2: Activation = Activation()


class Tail(NamedTuple):
    """The modules that read a finished block: norm and 1x1 of a transition, or a last norm alone."""

    norm: Any
    conv: nn.Conv2d | None
    relu: bool
    act: Activation = Activation()


def is_transition(module: nn.Module) -> bool:
    """Whether the children are exactly norm, (relu), conv, pool."""
    return list(module.__dict__["_modules"]) in _TRANSITIONS


def read_layer(module: Any, name: str) -> Layer:
    """Reads norm1, relu1, conv1, norm2, relu2, conv2 (conv1 and norm2 may be missing together)."""
    check_no_hooks(module, name)
    if not is_known_class(module, _LAYERS):
        raise NotFusible(f"{name} is a {type(module).__name__}, not a known dense layer")
    where = f"{name}."
    known = ["norm1", "relu1", "conv1", "norm2", "relu2", "conv2"]
    if list(module.__dict__["_modules"]) == ["layers"]:  # MONAI's layer is a sequence of these, and perhaps a dropout
        module, where = child(module, "layers"), f"{name}.layers."
        check_no_hooks(module, f"{name}.layers")
        if type(module) is not nn.Sequential or list(module._modules)[:6] != known:
            raise NotFusible(f"{name}.layers is not a sequence of {', '.join(known)}")
        known = [*known, "dropout"]
        check_leaves_input(module, "norm1", "relu1", where)
    children = {key for key, value in module.__dict__["_modules"].items() if value is not None}
    depth = read_stochastic_depth(module, where)
    unknown = children - set(known) - ({"stochastic_depth"} if depth is not None else set())
    if unknown:
        raise NotFusible(f"{name} has unknown sub-modules {sorted(unknown)}")
    norm1, act1 = _read_norm(module, "norm1", "relu1", where)
    conv1, norm2, act2 = None, None, Activation()
    if "conv1" in children:
        conv1 = check_conv(child(module, "conv1"), f"{where}conv1", 1, bias=True)
        norm2, act2 = _read_norm(module, "norm2", "relu2", where)
    conv2 = check_conv(child(module, "conv2"), f"{where}conv2", None, bias=True)
    layer = Layer(norm1, conv1, norm2, conv2, _drop_rate(module, where), depth, act1, act2)
    check_norms_fit(layer, f"{where}norm1", f"{where}norm2")
    return layer


def check_norms_fit(layer: Layer, norm1: str, norm2: str) -> None:
    """Raises NotFusible where norms, of the given names, do not fit the convolutions that read them."""
    _check_in_front(layer.norm1, norm1, layer.conv1 or layer.conv2)
    if layer.norm2 is not None:
        _check_in_front(layer.norm2, norm2, layer.conv2)


def _check_in_front(norm: Any, name: str, conv: nn.Conv2d) -> None:
    check_fits(norm, name, conv.weight.shape[1], conv.weight.dim() - 2)


def check_leaves_input(module: nn.Module, norm: str, act: str, where: str) -> None:
    """Raises NotFusible where an activation in place changes what the module was given, as no norm copies it."""
    if type(child(module, norm)) is nn.Identity and getattr(child(module, act), "inplace", False):
        raise NotFusible(f"{where}{act} works in place behind an Identity, and so on what others read")


def _read_norm(module: nn.Module, norm: str, act: str, where: str) -> tuple[Any, Activation]:
    """A norm followed by an activation: two modules, or one that does both; an Identity stands for no norm."""
    found = child(module, norm)
    if type(found) is nn.Identity:
        check_no_hooks(found, f"{where}{norm}")
    else:
        found = check_dense_norm(found, f"{where}{norm}")
    inner, behind = fused_activation(found), child(module, act)
    if (inner is None) == (behind is None):
        raise NotFusible(f"{where}{norm} is not followed by one activation")
    if inner is not None:
        return found, read_activation(inner, f"{where}{norm}.act")
    return found, read_activation(behind, f"{where}{act}")  # type: ignore[arg-type]


def read_stochastic_depth(module: Any, where: str) -> StochasticDepth | None:
    """What leaves a layer or block out at random; only this library's own have one."""
    depth = child(module, "stochastic_depth")
    if type(depth) is not StochasticDepth:
        return None
    check_no_hooks(depth, f"{where}stochastic_depth")
    if depth.draws_samples:
        raise NotFusibleInTraining(f"{where}stochastic_depth drops per sample")
    return depth


def draw_factors(depths: Iterable[StochasticDepth | None]) -> list[float | torch.Tensor]:
    """One mini-batch's factors of layers, in order; 0 for those left out."""
    return [1.0 if depth is None else depth.draw() for depth in depths]


def scaled(weight: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """The weight, or bias, of a last convolution whose output is multiplied by ``factor``."""
    if isinstance(factor, torch.Tensor):
        return weight * factor.to(weight)
    return weight if factor in (0, 1) else weight * factor


def _drop_rate(module: Any, where: str) -> float:
    """Of an attribute, or of a module behind the layer; 0 outside training."""
    dropout: Any = child(module, "dropout")
    if dropout is None:
        return float(getattr(module, "drop_rate", 0.0)) if module.training else 0.0
    check_no_hooks(dropout, f"{where}dropout")
    if not dropout.training or dropout.p == 0:
        return 0.0
    if type(dropout) is not nn.Dropout:
        raise NotFusibleInTraining(f"{where}dropout is a {type(dropout).__name__}, not an nn.Dropout")
    return float(dropout.p)


def read_block(module: nn.Module) -> list[Layer]:
    """Reads the layers of a dense block, in order."""
    check_no_global_hooks()
    return check_alike([read_layer(layer, name) for name, layer in module.named_children()])


def check_alike(layers: list[Layer]) -> list[Layer]:
    if len({_common(layer) for layer in layers}) > 1:
        raise NotFusible("its layers differ in growth rate, bottleneck, kernel or drop_rate")
    check_one_kind(norms_of(layers, None))
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
    norm, act = _read_norm(module, "norm", "relu", "")
    conv = check_conv(child(module, "conv"), "conv", 1, bias=True)
    _check_in_front(norm, "norm", conv)
    pool: Any = child(module, "pool")
    if type(pool) not in _POOLS:
        raise NotFusible(f"pool is a {type(pool).__name__}, not an average pool")
    check_no_hooks(pool, "pool")
    dims = _POOLS.index(type(pool)) + 1
    kernel, stride, padding = (set(per_axis(size, dims)) for size in (pool.kernel_size, pool.stride, pool.padding))
    if not (kernel == stride == {2} and padding == {0}) or pool.ceil_mode:
        raise NotFusible(f"pool is {pool}: expected kernel and stride 2 without padding")
    if getattr(pool, "divisor_override", None) is not None:
        raise NotFusible("pool has a divisor_override")
    return Tail(norm, conv, True, act)


def read_last_norm(module: nn.Module) -> Tail:
    """Reads a norm behind the last block, with or without an activation inside."""
    check_no_global_hooks()
    norm = check_dense_norm(module, "norm")
    inner = fused_activation(norm)
    if inner is None:
        return Tail(norm, None, False)
    return Tail(norm, None, True, read_activation(inner, "norm.act"))


def norms_of(layers: list[Layer], tail: Tail | None) -> Iterator[Any]:
    """All norms in the order of the operator's arguments."""
    for layer in layers:
        yield layer.norm1
        if layer.norm2 is not None:
            yield layer.norm2
    if tail is not None:
        yield tail.norm


def norm_weights(norm: Any, conv: torch.Tensor | None = None) -> NormWeights:
    """``conv``: the weight of the convolution that reads it, which tells how many channels an Identity has."""
    if type(norm) is nn.Identity and conv is not None:
        return NormWeights(None, None, conv.new_zeros(conv.shape[1]), conv.new_ones(conv.shape[1]), 0.0)
    # As in nn.BatchNorm: the running statistics normalise in eval mode, where there are any.
    mean, var = (None, None) if takes_statistics(norm) else (norm.running_mean, norm.running_var)
    return NormWeights(norm.weight, norm.bias, mean, var, norm.eps, _groups(norm))


def takes_statistics(norm: Any) -> bool:
    """Whether a norm takes those of its input in its mode of now."""
    if type(norm) is nn.Identity:
        return False
    return norm.training or getattr(norm, "running_mean", None) is None


def _groups(norm: Any) -> int:
    if type(norm) is nn.GroupNorm:
        return norm.num_groups
    return norm.num_features if type(norm) in INSTANCE_NORMS else 0


def check_one_kind(norms: Iterable[Any]) -> bool:
    """Whether norms take the statistics of each sample; raises NotFusible where only some of them do."""
    kinds = {type(norm) in SAMPLE_NORMS for norm in norms if takes_statistics(norm)}
    if len(kinds) > 1:
        raise NotFusible("some of its norms take statistics of the batch, others of each sample")
    return True in kinds


def layer_weights(layer: Layer, factor: float | torch.Tensor = 1.0) -> LayerWeights:
    return LayerWeights(
        norm_weights(layer.norm1, (layer.conv1 or layer.conv2).weight),
        layer.conv1.weight if layer.conv1 is not None else None,
        norm_weights(layer.norm2, layer.conv2.weight) if layer.norm2 is not None else None,
        scaled(layer.conv2.weight, factor),
        layer.act1,
        layer.act2,
        layer.conv1.bias if layer.conv1 is not None else None,
        None if layer.conv2.bias is None else scaled(layer.conv2.bias, factor),
    )


def tail_weights(tail: Tail) -> TailWeights:
    conv, bias = (tail.conv.weight, tail.conv.bias) if tail.conv is not None else (None, None)
    return TailWeights(norm_weights(tail.norm, conv), conv, tail.relu, tail.act, bias)

# SPDX-License-Identifier: Apache-2.0
"""The networks under test: plain PyTorch models, and the variants that are compared.

Every variant of a run starts from the same plain model, built after the same seed, so that all
of them hold the same weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from fastdense import models
from fastdense._choices import DualPathMemoryMode
from fastdense._support import InputError, extra
from fastdense.fusion.convert import convert, restore

# Dense layers per block of the ImageNet networks that torchvision has no function for.
_MORE_BLOCKS = {"densenet264": (6, 12, 64, 48)}
_TORCHVISION = ("densenet121", "densenet161", "densenet169", "densenet201")
_TIMM = ("dpn48b", "dpn68", "dpn68b", "dpn92", "dpn98", "dpn107", "dpn131")


@dataclasses.dataclass(frozen=True)
class Net:
    """A network by name; the fields after it count for `densenet_cifar` only.

    Attributes:
        name: e.g. ``"densenet121"``, ``"densenet264"``, ``"densenet_cifar"``.
        depth: layers with weights, 6 n + 4 with bottlenecks, 3 n + 4 without.
        growth_rate: channels each dense layer adds.
        bottleneck: whether a 1x1 convolution precedes each 3x3.
        compression: share of the channels a transition keeps, in (0, 1].
        num_classes: outputs; None stands for the usual 10 (CIFAR) or 1000 (ImageNet).
    """

    name: str
    depth: int = 100
    growth_rate: int = 12
    bottleneck: bool = True
    compression: float = 0.5
    num_classes: int | None = None

    @property
    def is_cifar(self) -> bool:
        """Whether the network is of the CIFAR family: three blocks, no pooling in the stem."""
        return self.name == "densenet_cifar"

    @property
    def classes(self) -> int:
        """Number of outputs."""
        return self.num_classes or (10 if self.is_cifar else 1000)

    @property
    def default_size(self) -> int:
        """Side of the images the network was made for, in pixels."""
        return 32 if self.is_cifar else 224

    @property
    def label(self) -> str:
        """The name people use, e.g. ``DenseNet-BC (L=100, k=12)``."""
        if not self.is_cifar:
            return self.name.replace("densenet", "DenseNet-").replace("dpn", "DPN-")
        kind = "-BC" if self.bottleneck and self.compression < 1 else ""
        return f"DenseNet{kind} (L={self.depth}, k={self.growth_rate})"

    def create_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `fastdense.models.create`."""
        if not self.is_cifar:
            return {"num_classes": self.classes}
        values = dataclasses.asdict(self) | {"num_classes": self.classes}
        del values["name"]
        return values


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run a network.

    Attributes:
        channels_last: memory format of weights and images.
        memory_efficient: the baseline library's own activation checkpointing.
        compile: the mode of torch.compile, or None without it.
        memory: fastdense's memory mode, or None for plain PyTorch.
        timm: timm's model of the network in the place of torchvision's.
        planned: the modes are those that fit into a budget, see :func:`fastdense.plan_memory`.
        graph: the whole step is captured in a CUDA graph once, and replayed.
        frozen: weights are packed once, see :func:`fastdense.freeze`; in eval mode only.
        engine: what runs the network in the place of PyTorch; in eval mode only.
    """

    channels_last: bool
    memory_efficient: bool = False
    compile: str | None = None
    memory: DualPathMemoryMode | None = None
    timm: bool = False
    planned: bool = False
    graph: bool = False
    frozen: bool = False
    engine: str | None = None

    @property
    def is_for_eval(self) -> bool:
        """Whether the variant has no training step."""
        return self.frozen or self.engine is not None


VARIANTS = {
    "plain": Variant(channels_last=False),
    "plain-channels-last": Variant(channels_last=True),
    "memory-efficient": Variant(channels_last=False, memory_efficient=True),
    "memory-efficient-channels-last": Variant(channels_last=True, memory_efficient=True),
    "timm": Variant(channels_last=True, timm=True),
    "compile": Variant(channels_last=True, compile="default"),
    "compile-max-autotune": Variant(channels_last=True, compile="max-autotune"),
    "plain-channels-last-graph": Variant(channels_last=True, graph=True),
    "balanced": Variant(channels_last=True, memory="balanced"),
    "min": Variant(channels_last=True, memory="min"),
    "balanced-graph": Variant(channels_last=True, memory="balanced", graph=True),
    "min-graph": Variant(channels_last=True, memory="min", graph=True),
    "reversible": Variant(channels_last=True, memory="reversible"),
    "recompute": Variant(channels_last=True, memory="recompute"),
    "budget": Variant(channels_last=True, memory="balanced", planned=True),
    "frozen": Variant(channels_last=True, memory="balanced", frozen=True),
    "onnxruntime": Variant(channels_last=False, engine="onnxruntime"),
    "openvino": Variant(channels_last=False, engine="openvino"),
}

# The two layouts of unchanged PyTorch; ratios refer to the better of them.
PLAIN_LAYOUTS = ("plain", "plain-channels-last")


def known_nets() -> list[str]:
    """Names that `plain_model` accepts."""
    own = [name for name in models.list() if not models.is_super_resolution(name)]
    return sorted({*_TORCHVISION, *_TIMM, *_MORE_BLOCKS, "densenet_cifar", *own})


def plain_model(net: Net, *, memory_efficient: bool = False) -> nn.Module:
    """Builds a network of plain PyTorch modules with random weights.

    The real torchvision or timm model where there is one; torchvision's DenseNet class for the
    other bottleneck networks; fastdense's architecture in plain modules for the rest.

    Raises:
        InputError: the name is unknown, or there is no memory-efficient form.
    """
    with extra("train"):
        from torchvision.models import get_model
        from torchvision.models.densenet import DenseNet
    if net.name in _TIMM:
        return _timm_model(net, memory_efficient)
    if net.name in _TORCHVISION:
        return get_model(net.name, weights=None, num_classes=net.classes, memory_efficient=memory_efficient)
    if net.name in _MORE_BLOCKS:
        return DenseNet(
            block_config=_MORE_BLOCKS[net.name],
            num_classes=net.classes,
            memory_efficient=memory_efficient,
        )
    if net.is_cifar and net.bottleneck and net.compression == 0.5:
        return cifar_densenet(net, memory_efficient=memory_efficient)
    return _restored_model(net, memory_efficient)


def _timm_model(net: Net, memory_efficient: bool) -> nn.Module:
    """A dual path network of timm; with `memory_efficient`, every block runs again in the backward pass."""
    with extra("train"):
        import timm
    model: Any = timm.create_model(net.name, num_classes=net.classes)
    if memory_efficient:
        model.set_grad_checkpointing()
    return model


def cifar_densenet(net: Net, *, memory_efficient: bool = False) -> nn.Module:
    """Builds the CIFAR DenseNet-BC out of torchvision's DenseNet class.

    Three blocks of (depth - 4) / 6 layers; the stem is a 3x3 convolution of stride 1 without
    norm, ReLU or pooling. 769,162 parameters at depth 100 and growth rate 12.

    Reference:
        Huang et al., Densely Connected Convolutional Networks, 2017, arXiv 1608.06993, section 3.
    """
    with extra("train"):
        from torchvision.models.densenet import DenseNet
    layers, rest = divmod(net.depth - 4, 6)
    if rest or layers < 1:
        raise InputError(
            f"densenet_cifar: expected depth to be 6 n + 4 with n >= 1 (10, 16, ..., 40, ..., 100), got {net.depth}"
        )
    model = DenseNet(
        growth_rate=net.growth_rate,
        block_config=(layers, layers, layers),
        num_init_features=2 * net.growth_rate,
        num_classes=net.classes,
        memory_efficient=memory_efficient,
    )
    stem = nn.Conv2d(3, 2 * net.growth_rate, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight)
    model.features.conv0 = stem
    for name in ("norm0", "relu0", "pool0"):
        delattr(model.features, name)
    return model


def _restored_model(net: Net, memory_efficient: bool) -> nn.Module:
    """Builds one of fastdense's networks and turns it into plain modules."""
    if net.name not in models.list():
        known = ", ".join(known_nets())
        raise InputError(f"bench: expected --model to be one of {known}, got {net.name!r}")
    if memory_efficient:
        raise InputError(f"bench: {net.label} has no memory_efficient variant in torchvision")
    return restore(models.create(net.name, **net.create_kwargs()))


def _moved_to_timm(net: Net, like: nn.Module) -> nn.Module:
    """timm's model of one of torchvision's networks, with its weights, whose names they share.

    Raises:
        InputError: the network is none of torchvision's.
    """
    with extra("train"):
        import timm
    if net.name not in _TORCHVISION:
        raise InputError(f"bench: expected a torchvision network for the timm variants, got {net.label}")
    model = timm.create_model(net.name, pretrained=False, num_classes=net.classes)
    model.load_state_dict(like.state_dict())
    return model


def build(net: Net, variant: Variant) -> nn.Module:
    """Builds a network as a variant wants it, except for torch.compile."""
    model = plain_model(net, memory_efficient=variant.memory_efficient)
    if variant.timm:
        model = _moved_to_timm(net, model)
    if variant.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if variant.memory is not None:
        if variant.memory not in models.memory_modes(net.name):
            raise InputError(f"bench: expected a memory mode of {net.label}, got {variant.memory!r}")
        model = convert(model, memory=variant.memory)
    return model

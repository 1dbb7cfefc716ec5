# SPDX-License-Identifier: Apache-2.0
"""DenseNets for ImageNet and CIFAR on shared buffers, with torchvision's parameter names.

Reference:
    G. Huang, Z. Liu, L. van der Maaten, K. Weinberger. Densely Connected Convolutional Networks. CVPR 2017,
    arXiv:1608.06993, table 1 (ImageNet) and section 4.2 (CIFAR).
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from typing import Any, TypedDict, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from fastdense._choices import MemoryMode, SurvivalMode, SurvivalScale
from fastdense.models.recipe import keep_recipe, keeps_recipe
from fastdense.models.weights import (
    DenseNet121_Weights,
    DenseNet161_Weights,
    DenseNet169_Weights,
    DenseNet201_Weights,
    PublishedWeights,
    WeightsLike,
    find_weights,
)
from fastdense.nn import DenseBlock, DenseFeatures, Transition, linear_decay
from fastdense.plain.activation import ActivationName, make_activation
from fastdense.plain.arguments import check_positive
from fastdense.plain.norm import NormName, make_norm

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MAX_POOL = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_POOL = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


class DenseNet(nn.Module):
    """Dense blocks with transitions between them, a last norm, global average pooling and a linear classifier.

    Args:
        stem: modules before the first block, by name.
        in_channels: channels after the stem.
        growth_rate: channels ``k`` that each layer adds.
        block_config: number of layers of each block.
        bn_size: width of the bottleneck in units of ``growth_rate``.
        bottleneck: False for layers of norm, ReLU, 3x3.
        compression: theta in (0, 1]; a transition maps ``C`` to ``floor(theta * C)`` channels.
        drop_rate: probability in [0, 1] that a new feature is dropped in training.
        survival: stochastic depth, probability in [0, 1] that the last layer of the last block is computed in training;
            it decays linearly over the layers of all blocks. See :class:`fastdense.nn.DenseBlock`.
        survival_mode, survival_scale: see :class:`fastdense.nn.StochasticDepth`.
        num_classes: outputs of the classifier.
        spatial_dims: 1, 2 or 3, as the stem.
        memory: memory mode of the blocks, see :class:`fastdense.nn.DenseBlock`.
        norm: the norms of the blocks, transitions and the last one, see :class:`fastdense.nn.DenseBlock`.
        act: activation of the blocks, transitions and the last norm, see :class:`fastdense.nn.DenseBlock`.

    Shape:
        ``[N, channels, spatial]`` to ``[N, num_classes]``.
    """

    def __init__(
        self,
        stem: Sequence[tuple[str, nn.Module]],
        in_channels: int,
        *,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        bn_size: int = 4,
        bottleneck: bool = True,
        compression: float = 0.5,
        drop_rate: float = 0.0,
        survival: float = 1.0,
        survival_mode: SurvivalMode = "batch",
        survival_scale: SurvivalScale = "test",
        num_classes: int = 1000,
        spatial_dims: int = 2,
        memory: MemoryMode = "balanced",
        norm: NormName = "batch",
        act: ActivationName = "relu",
    ) -> None:
        super().__init__()
        if not 0 < compression <= 1:
            raise ValueError(f"DenseNet: expected compression to be in (0, 1], got {compression!r}")
        modules = list(stem)
        channels = in_channels
        probabilities = iter(linear_decay(sum(block_config), survival))
        for index, num_layers in enumerate(block_config, start=1):
            block = DenseBlock(
                num_layers,
                channels,
                growth_rate,
                bn_size=bn_size,
                bottleneck=bottleneck,
                drop_rate=drop_rate,
                survival=list(islice(probabilities, num_layers)),
                survival_mode=survival_mode,
                survival_scale=survival_scale,
                memory=memory,
                spatial_dims=spatial_dims,
                norm=norm,
                act=act,
            )
            modules.append((f"denseblock{index}", block))
            channels = block.out_channels
            if index < len(block_config):
                compressed = int(channels * compression)
                transition = Transition(channels, compressed, spatial_dims=spatial_dims, norm=norm, act=act)
                modules.append((f"transition{index}", transition))
                channels = compressed
        modules.append(("norm5", make_norm("DenseNet", norm, channels, spatial_dims)))
        self.features = DenseFeatures(OrderedDict(modules))
        if act != "relu":
            self.act = make_activation("DenseNet", act)
        self.classifier = nn.Linear(channels, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """He initialisation of convolutions, as torchvision's."""
        for module in self.modules():
            if isinstance(module, _CONV):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.act(x) if "act" in self._modules else F.relu(x, inplace=True)
        return self.classifier(_POOL[x.dim() - 3](x, 1).flatten(1))


class DenseNetOptions(TypedDict, total=False):
    """Arguments of the DenseNets for ImageNet; those left out have the defaults of :class:`DenseNet`."""

    weights: WeightsLike | None
    """What to begin with: a member of the model's enumeration or its name ("DEFAULT"), a name of timm such as
    "timm/densenet121.ra_in1k", or a file; see :func:`load_weights`."""
    progress: bool
    """Whether to show the download of weights, True by default."""
    image_channels: int
    """Channels of the input, by default those of the weights, or 3; ``in_channels`` is MONAI's word for it."""
    num_classes: int
    """Outputs of the classifier, by default those of the weights, or 1000; ``out_channels`` is MONAI's word for it."""
    spatial_dims: int
    """1 for signals, 2 for images, 3 for volumes."""
    drop_rate: float
    """Probability that a new feature is dropped in training; ``dropout_prob`` is MONAI's word for it."""
    memory: MemoryMode
    """What the blocks keep for the backward pass."""
    norm: NormName
    """The norms of the stem and everything behind it, as of :class:`fastdense.nn.DenseBlock`."""
    act: ActivationName
    """The activation of the stem and everything behind it, as of :class:`fastdense.nn.DenseBlock`."""
    bn_size: int
    """Width of the bottleneck in units of the growth rate."""
    bottleneck: bool
    """Whether a 1x1 convolution stands in front of each 3x3."""
    compression: float
    """Share of the channels that a transition keeps."""
    survival: float
    """Stochastic depth, as of :class:`DenseNet`."""
    survival_mode: SurvivalMode
    """See :class:`fastdense.nn.StochasticDepth`."""
    survival_scale: SurvivalScale
    """See :class:`fastdense.nn.StochasticDepth`."""
    in_channels: int
    """MONAI's word for ``image_channels``."""
    out_channels: int
    """MONAI's word for ``num_classes``."""
    dropout_prob: float
    """MONAI's word for ``drop_rate``."""


_MONAI = {"in_channels": "image_channels", "out_channels": "num_classes", "dropout_prob": "drop_rate"}


def _imagenet(
    op: str,
    block_config: Sequence[int],
    growth_rate: int,
    init_features: int,
    options: DenseNetOptions,
    published: type[PublishedWeights] | None = None,
) -> DenseNet:
    given: dict[str, Any] = {}
    for name, value in options.items():
        ours = _MONAI.get(name, name)
        if ours != name and ours in options:
            raise ValueError(f"{op}: expected {ours} or {name}, MONAI's word for it, got both")
        given[ours] = value
    source = find_weights(op, given.pop("weights", None), published, given.pop("progress", True))
    sizes = source.sizes("features.conv0", "classifier") if source else {}
    arguments: dict[str, Any] = {"image_channels": 3, "spatial_dims": 2} | sizes | given
    recipe = arguments | ({"growth_rate": growth_rate} if op == "densenet264" else {})
    image_channels, spatial_dims = arguments.pop("image_channels"), arguments["spatial_dims"]
    if spatial_dims not in (1, 2, 3):
        raise ValueError(f"{op}: expected spatial_dims to be 1, 2 or 3, got {spatial_dims!r}")
    dims = spatial_dims - 1
    stem: list[tuple[str, nn.Module]] = [
        ("conv0", _CONV[dims](image_channels, init_features, 7, stride=2, padding=3, bias=False)),
        ("norm0", make_norm(op, arguments.get("norm", "batch"), init_features, spatial_dims)),
        ("relu0", make_activation(op, arguments.get("act", "relu"))),
        ("pool0", _MAX_POOL[dims](3, stride=2, padding=1)),
    ]
    model = DenseNet(stem, init_features, growth_rate=growth_rate, block_config=block_config, **arguments)
    if source:
        source.load(op, model)
    return keep_recipe(model, op, recipe)


def densenet121(**options: Unpack[DenseNetOptions]) -> DenseNet:
    """DenseNet-121, k=32, 7,978,856 parameters at 1000 classes.

    Example:
        >>> volumes = densenet121(spatial_dims=3, in_channels=1, out_channels=2)

    Published weights come with ``densenet121(weights="IMAGENET1K_V1", num_classes=5)``.
    """
    return _imagenet("densenet121", (6, 12, 24, 16), 32, 64, options, DenseNet121_Weights)


def densenet161(**options: Unpack[DenseNetOptions]) -> DenseNet:
    """DenseNet-161, k=48, 28,681,000 parameters at 1000 classes."""
    return _imagenet("densenet161", (6, 12, 36, 24), 48, 96, options, DenseNet161_Weights)


def densenet169(**options: Unpack[DenseNetOptions]) -> DenseNet:
    """DenseNet-169, k=32, 14,149,480 parameters at 1000 classes."""
    return _imagenet("densenet169", (6, 12, 32, 32), 32, 64, options, DenseNet169_Weights)


def densenet201(**options: Unpack[DenseNetOptions]) -> DenseNet:
    """DenseNet-201, k=32, 20,013,928 parameters at 1000 classes."""
    return _imagenet("densenet201", (6, 12, 48, 32), 32, 64, options, DenseNet201_Weights)


def densenet264(*, growth_rate: int = 32, **options: Unpack[DenseNetOptions]) -> DenseNet:
    """DenseNet-264: 33,337,704 parameters with k=32, 72,686,632 with k=48 (arXiv:1707.06990)."""
    return _imagenet("densenet264", (6, 12, 64, 48), growth_rate, 2 * growth_rate, options)


@keeps_recipe
def densenet_cifar(
    depth: int = 100,
    growth_rate: int = 12,
    bottleneck: bool = True,
    compression: float = 0.5,
    num_classes: int = 10,
    *,
    bn_size: int = 4,
    drop_rate: float = 0.0,
    survival: float = 1.0,
    survival_mode: SurvivalMode = "batch",
    survival_scale: SurvivalScale = "test",
    memory: MemoryMode = "balanced",
    norm: NormName = "batch",
    act: ActivationName = "relu",
) -> DenseNet:
    """DenseNet for small images: three blocks, a 3x3 stem of stride 1, no pooling in front.

    Args:
        depth: number of layers ``L``; ``(L - 4) / 3`` layers a block, or ``(L - 4) / 6`` with a bottleneck.
        growth_rate: channels ``k`` that each layer adds.
        bottleneck: DenseNet-BC with True; without it the stem has 16 channels and published nets have
            ``compression=1``.
        compression: theta of the transitions.
        num_classes: outputs of the classifier.
        bn_size, drop_rate, survival, survival_mode, survival_scale, memory, norm, act: see :class:`DenseNet`.

    Raises:
        ValueError: if ``depth`` does not give three equal blocks.

    Example:
        >>> sum(p.numel() for p in densenet_cifar(100, 12).parameters())
        769162
    """
    convolutions = 6 if bottleneck else 3
    check_positive("densenet_cifar", depth=depth)
    if depth < 4 + convolutions or (depth - 4) % convolutions:
        raise ValueError(f"densenet_cifar: expected depth to be 4 plus a multiple of {convolutions}, got {depth!r}")
    in_channels = 2 * growth_rate if bottleneck else 16
    stem = [("conv0", nn.Conv2d(3, in_channels, 3, padding=1, bias=False))]
    return DenseNet(
        stem,
        in_channels,
        growth_rate=growth_rate,
        block_config=[(depth - 4) // convolutions] * 3,
        bottleneck=bottleneck,
        compression=compression,
        num_classes=num_classes,
        bn_size=bn_size,
        drop_rate=drop_rate,
        survival=survival,
        survival_mode=survival_mode,
        survival_scale=survival_scale,
        memory=memory,
        norm=norm,
        act=act,
    )

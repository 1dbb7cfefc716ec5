# SPDX-License-Identifier: Apache-2.0
"""Dual path networks for ImageNet, with timm's parameter names.

Reference:
    Y. Chen, J. Li, H. Xiao, X. Jin, S. Yan, J. Feng. Dual Path Networks. NIPS 2017, arXiv:1707.01629, table 1 and the
    authors' code.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple, TypedDict, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from fastdense._choices import DualPathMemoryMode, SurvivalMode, SurvivalScale
from fastdense.models.recipe import keep_recipe
from fastdense.models.weights import WeightsLike, find_weights
from fastdense.nn import DenseFeatures, DualPathBlock, StochasticDepth, linear_decay
from fastdense.plain.activation import ActivationName, make_activation
from fastdense.plain.dual_path import NormRelu
from fastdense.plain.norm import NormName, make_norm

_EPS = 1e-3  # of every norm, as in the authors' framework
_POOL = 7  # side of the last map at 224, and of test-time pooling's windows


class ConvNormAct(nn.Module):
    """Strided convolution, norm, activation."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: NormName, act: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, 2, kernel_size // 2, bias=False)
        self.bn = make_norm("DPN", norm, out_channels, 2, eps=_EPS)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def _make_activation(act: ActivationName, kind: type[nn.Module] | None, inplace: bool) -> nn.Module:
    """By name, or of a class if there is one; in place, or not, where it can be."""
    made: Any = make_activation("DPN", act) if kind is None else kind()
    if hasattr(made, "inplace"):
        made.inplace = inplace
    return made


class DPN(nn.Module):
    """A stem, four stages of dual path blocks, norm, ReLU, global average pooling and a classifier.

    Args:
        stem_channels: channels after the stem.
        stem_kernel: side of the stem's convolution.
        width: bottleneck channels of the first stage; they double with every stage.
        groups: of the 3x3 convolutions.
        blocks: number of blocks of each stage.
        growth_rates: channels that each block of a stage appends to the dense path.
        residual_channels: channels of the residual path in the first stage; they double with every stage.
        split_last: whether the last 1x1 convolution of a block is two, one a path.
        activation: class of the activation of the stem and in front of the pooling; None for ``act``.
        image_channels: channels of the input.
        num_classes: outputs of the classifier.
        drop_rate: probability in [0, 1] that a feature in front of the classifier is dropped in training.
        survival: stochastic depth, probability in [0, 1] that the last block is computed in training; it decays
            linearly over the blocks of all stages. See :class:`fastdense.nn.DualPathStage`.
        survival_mode, survival_scale: see :class:`fastdense.nn.StochasticDepth`.
        test_time_pooling: in eval mode, classify every 7x7 window of the last map and take the mean of their average
            and their maximum, for pictures larger than those of training.
        memory: memory mode of the stages, see :func:`fastdense.ops.dual_path_stage`.
        norm: the norms, see :class:`fastdense.nn.DualPathBlock`.
        act: the activation, see :class:`fastdense.nn.DualPathBlock`.

    Shape:
        ``[N, image_channels, H, W]`` to ``[N, num_classes]``.
    """

    def __init__(
        self,
        *,
        stem_channels: int = 64,
        stem_kernel: int = 7,
        width: int = 96,
        groups: int = 32,
        blocks: Sequence[int] = (3, 4, 20, 3),
        growth_rates: Sequence[int] = (16, 32, 24, 128),
        residual_channels: int = 256,
        split_last: bool = False,
        activation: type[nn.Module] | None = None,
        image_channels: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        survival: float = 1.0,
        survival_mode: SurvivalMode = "batch",
        survival_scale: SurvivalScale = "test",
        test_time_pooling: bool = False,
        memory: DualPathMemoryMode = "balanced",
        norm: NormName = "batch",
        act: ActivationName = "relu",
    ) -> None:
        super().__init__()
        if len(blocks) != len(growth_rates):
            raise ValueError(
                f"DPN: expected growth_rates to have one entry for each of {len(blocks)} stages, got {growth_rates!r}"
            )
        if not 0 <= drop_rate <= 1:
            raise ValueError(f"DPN: expected drop_rate to be a probability in [0, 1], got {drop_rate!r}")
        features: OrderedDict[str, nn.Module] = OrderedDict()
        features["conv1_1"] = ConvNormAct(
            image_channels, stem_channels, stem_kernel, norm, _make_activation(act, activation, inplace=True)
        )
        features["conv1_pool"] = nn.MaxPool2d(3, stride=2, padding=1)
        self._ends = [1]  # of the stem's convolution and the stages in `features`
        channels = stem_channels
        probabilities = iter(linear_decay(sum(blocks), survival))
        for stage, (count, growth_rate) in enumerate(zip(blocks, growth_rates, strict=True)):
            for index, p in enumerate(islice(probabilities, count)):
                block = DualPathBlock(
                    channels,
                    width << stage,
                    residual_channels << stage,
                    growth_rate,
                    groups=groups,
                    projection=index == 0,
                    stride=2 if stage > 0 and index == 0 else 1,
                    split_last=split_last,
                    stochastic_depth=StochasticDepth(p, survival_mode, survival_scale) if p < 1 else None,
                    eps=_EPS,
                    memory=memory,
                    norm=norm,
                    act=act,
                )
                features[f"conv{stage + 2}_{index + 1}"] = block
                channels = block.out_channels
            self._ends.append(len(features))
        last = NormRelu(channels, eps=_EPS, norm=norm)
        last.relu = _make_activation(act, activation, inplace=False)  # its input may be the last stage's output
        features["conv5_bn_ac"] = last
        self.features = DenseFeatures(features)
        self.num_features = channels
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.drop_rate = float(drop_rate)
        self.test_time_pooling = test_time_pooling
        self._initialise()

    def _initialise(self) -> None:
        """He initialisation of convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Feature maps for detection and segmentation: after the stem's convolution, and after each stage.

        Returns:
            One map ``[N, C_i, H / 2**i, W / 2**i]`` for the stem (``i = 1``) and each stage (``i = 2, 3, ...``).
        """
        outputs = []
        begin = 0
        for end in self._ends:
            x = self.features[begin:end](x)  # a stage at a time: its blocks share one operator call
            outputs.append(x)
            begin = end
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if self.test_time_pooling and not self.training and min(x.shape[2:]) > _POOL:
            scores = self.classifier(F.avg_pool2d(x, _POOL, stride=1))
            return (scores.mean((2, 3)) + scores.amax((2, 3))) / 2
        x = F.dropout(F.adaptive_avg_pool2d(x, 1), self.drop_rate, self.training)
        return self.classifier(x).flatten(1)


class _Variant(NamedTuple):
    """A published network; see :class:`DPN` for the fields."""

    stem_channels: int
    width: int
    groups: int
    blocks: tuple[int, ...]
    growth_rates: tuple[int, ...]
    small: bool = False  # a 3x3 stem and a quarter of the residual channels
    split_last: bool = False
    activation: type[nn.Module] | None = None


_VARIANTS = {
    "dpn48b": _Variant(10, 128, 32, (3, 4, 6, 3), (16, 32, 32, 64), True, True, nn.SiLU),
    "dpn68": _Variant(10, 128, 32, (3, 4, 12, 3), (16, 32, 32, 64), True),
    "dpn68b": _Variant(10, 128, 32, (3, 4, 12, 3), (16, 32, 32, 64), True, True),
    "dpn92": _Variant(64, 96, 32, (3, 4, 20, 3), (16, 32, 24, 128)),
    "dpn98": _Variant(96, 160, 40, (3, 6, 20, 3), (16, 32, 32, 128)),
    "dpn107": _Variant(128, 200, 50, (4, 8, 20, 3), (20, 64, 64, 128)),
    "dpn131": _Variant(128, 160, 40, (4, 8, 28, 3), (16, 32, 32, 128)),
}


class DPNOptions(TypedDict, total=False):
    """Arguments of the published networks; those left out have the defaults of :class:`DPN`."""

    weights: WeightsLike | None
    """What to begin with: a name of timm such as "timm/dpn92.mx_in1k", or a file; see :func:`load_weights`."""
    progress: bool
    """Whether to show the download of weights, True by default."""
    image_channels: int
    """Channels of the input, by default those of the weights, or 3."""
    num_classes: int
    """Outputs of the classifier, by default those of the weights, or 1000."""
    drop_rate: float
    """Probability that a feature in front of the classifier is dropped in training."""
    test_time_pooling: bool
    """In eval mode, classify every 7x7 window of the last map, for larger pictures; as of :class:`DPN`."""
    memory: DualPathMemoryMode
    """What the stages keep for the backward pass."""
    norm: NormName
    """The norms, as of :class:`fastdense.nn.DualPathBlock`."""
    act: ActivationName
    """The activation, as of :class:`fastdense.nn.DualPathBlock`; DPN-48b has SiLU in stem and head in any case."""
    survival: float
    """Stochastic depth, as of :class:`DPN`."""
    survival_mode: SurvivalMode
    """See :class:`fastdense.nn.StochasticDepth`."""
    survival_scale: SurvivalScale
    """See :class:`fastdense.nn.StochasticDepth`."""


def _create(name: str, options: DPNOptions) -> DPN:
    variant: dict[str, Any] = _VARIANTS[name]._asdict()
    small = variant.pop("small")
    given: dict[str, Any] = dict(options)
    source = find_weights(name, given.pop("weights", None), None, given.pop("progress", True))
    arguments = (source.sizes("features.conv1_1.conv", "classifier") if source else {}) | given
    variant |= {"stem_kernel": 3 if small else 7, "residual_channels": 64 if small else 256, **arguments}
    model = DPN(**variant)
    if source:
        source.load(name, model)
    return keep_recipe(model, name, arguments)


def dpn48b(**options: Unpack[DPNOptions]) -> DPN:
    """DPN-48b, 9,126,226 parameters at 1000 classes; SiLU in stem and head."""
    return _create("dpn48b", options)


def dpn68(**options: Unpack[DPNOptions]) -> DPN:
    """DPN-68, 12,611,602 parameters at 1000 classes."""
    return _create("dpn68", options)


def dpn68b(**options: Unpack[DPNOptions]) -> DPN:
    """DPN-68b, DPN-68 with ``split_last``."""
    return _create("dpn68b", options)


def dpn92(**options: Unpack[DPNOptions]) -> DPN:
    """DPN-92, 37,668,392 parameters at 1000 classes."""
    return _create("dpn92", options)


def dpn98(**options: Unpack[DPNOptions]) -> DPN:
    """DPN-98, 61,570,728 parameters at 1000 classes."""
    return _create("dpn98", options)


def dpn107(**options: Unpack[DPNOptions]) -> DPN:
    """DPN-107, 86,917,800 parameters at 1000 classes."""
    return _create("dpn107", options)


def dpn131(**options: Unpack[DPNOptions]) -> DPN:
    """DPN-131, 79,254,504 parameters at 1000 classes."""
    return _create("dpn131", options)

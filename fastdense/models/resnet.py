# SPDX-License-Identifier: Apache-2.0
"""Residual networks for small images with parameter-free shortcuts, and their stochastic depth.

Reference:
    K. He, X. Zhang, S. Ren, J. Sun. Deep Residual Learning for Image Recognition. CVPR 2016, arXiv:1512.03385,
    section 4.2, option A; the same. Identity Mappings in Deep Residual Networks. ECCV 2016, arXiv:1603.05027,
    figure 1(b); G. Huang et al. Deep Networks with Stochastic Depth. ECCV 2016, arXiv:1603.09382.
"""

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from fastdense._choices import SurvivalMode, SurvivalScale
from fastdense.models.recipe import keeps_recipe
from fastdense.plain.arguments import check_positive
from fastdense.plain.stochastic_depth import StochasticDepth, check_choice, linear_decay

ShortcutKind = Literal["subsample", "average"]
SHORTCUTS: tuple[ShortcutKind, ...] = get_args(ShortcutKind)


class Shortcut(nn.Module):
    """Identity shortcut, or option A where the shape changes: fewer pixels, and zeros in the new channels.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, not fewer.
        stride: step between the pixels kept.
        kind: "subsample" takes every ``stride``-th pixel, "average" the mean of ``stride x stride`` pixels (fewer at
            the last edge of an odd image).

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``.

    Raises:
        ValueError: if channels would have to go, or ``kind`` is unknown.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, kind: ShortcutKind = "subsample") -> None:
        super().__init__()
        check_choice("Shortcut", "kind", kind, SHORTCUTS)
        if out_channels < in_channels:
            raise ValueError(f"Shortcut: expected out_channels to be at least {in_channels}, got {out_channels!r}")
        self.new_channels = out_channels - in_channels
        self.stride = stride
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.stride != 1:
            if self.kind == "average":
                x = F.avg_pool2d(x, self.stride, ceil_mode=True)
            else:
                x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels)) if self.new_channels else x

    def extra_repr(self) -> str:
        return f"stride={self.stride}, new_channels={self.new_channels}, kind={self.kind!r}"


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: ``relu(id(x) + b * bn2(conv2(relu(bn1(conv1(x))))))``.

    With ``pre_activation``: ``id(x) + b * conv2(relu(bn2(conv1(relu(bn1(x))))))``.

    Args:
        in_channels, out_channels: channels of input and output.
        stride: of the first convolution and of the shortcut.
        pre_activation: norm and ReLU in front of each convolution, and none behind the sum.
        shortcut: "subsample" or "average", see :class:`Shortcut`.
        bias: whether the convolutions have one.
        drop: how the branch is gated; None for ``b = 1``.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        pre_activation: bool = False,
        shortcut: ShortcutKind = "subsample",
        bias: bool = False,
        drop: StochasticDepth | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(in_channels if pre_activation else out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = Shortcut(in_channels, out_channels, stride, shortcut)
        self.drop = StochasticDepth(1.0) if drop is None else drop
        self.pre_activation = pre_activation

    def branch(self, x: Tensor) -> Tensor:
        """The residual function, before its gate and the sum."""
        if self.pre_activation:
            return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.branch, x, self.shortcut(x))
        return y if self.pre_activation else F.relu(y)


class ResNet(nn.Module):
    """A 3x3 stem of 16 channels, three stages of 16, 32 and 64 channels, global average pooling, a linear classifier.

    Args:
        depth: number of layers, ``6 n + 2`` for ``n`` blocks a stage.
        num_classes: outputs of the classifier.
        pre_activation: norm and ReLU in front of each convolution.
        shortcut: "subsample" (He et al.) or "average" (the authors of stochastic depth).
        bias: whether the convolutions have one.
        survival: probability in [0, 1] that the last block is computed in training; those before it decay linearly
            from 1 to it. 1 is a residual network without stochastic depth.
        mode, scale: see :class:`fastdense.nn.StochasticDepth`.
        in_channels: channels of the images.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Raises:
        ValueError: if ``depth`` does not give three equal stages, or another argument is out of range.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        pre_activation: bool = False,
        shortcut: ShortcutKind = "subsample",
        bias: bool = False,
        survival: float = 1.0,
        mode: SurvivalMode = "batch",
        scale: SurvivalScale = "test",
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_positive("ResNet", depth=depth)
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"ResNet: expected depth to be 2 plus a positive multiple of 6, got {depth!r}")
        per_stage = (depth - 2) // 6
        probabilities = iter(linear_decay(3 * per_stage, survival))
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(64 if pre_activation else 16)
        channels = 16
        stages = []
        for stage, width in enumerate((16, 32, 64), start=1):
            blocks = []
            for index in range(per_stage):
                block = ResidualBlock(
                    channels,
                    width,
                    2 if stage > 1 and index == 0 else 1,
                    pre_activation=pre_activation,
                    shortcut=shortcut,
                    bias=bias,
                    drop=StochasticDepth(next(probabilities), mode, scale),
                )
                blocks.append(block)
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(channels, num_classes)
        self.pre_activation = pre_activation
        self._initialise()

    def _initialise(self) -> None:
        """He initialisation of convolutions, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if not self.pre_activation:
            x = F.relu(self.bn1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        if self.pre_activation:
            x = F.relu(self.bn1(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@keeps_recipe
def resnet_cifar(
    depth: int = 110,
    num_classes: int = 10,
    *,
    pre_activation: bool = False,
    shortcut: ShortcutKind = "subsample",
    bias: bool = False,
    survival: float = 1.0,
    mode: SurvivalMode = "batch",
    scale: SurvivalScale = "test",
    in_channels: int = 3,
) -> ResNet:
    """ResNet with option A shortcuts; arguments of :class:`ResNet`.

    | depth | 20 | 32 | 44 | 56 | 110 | 1202 |
    | --- | --- | --- | --- | --- | --- | --- |
    | parameters | 269,722 | 464,154 | 658,586 | 853,018 | 1,727,962 | 19,421,274 |

    Reference:
        K. He et al. Deep Residual Learning for Image Recognition. CVPR 2016, arXiv:1512.03385, table 6.

    Example:
        >>> sum(p.numel() for p in resnet_cifar(20).parameters())
        269722
    """
    return ResNet(
        depth,
        num_classes=num_classes,
        pre_activation=pre_activation,
        shortcut=shortcut,
        bias=bias,
        survival=survival,
        mode=mode,
        scale=scale,
        in_channels=in_channels,
    )


@keeps_recipe
def preresnet_cifar(
    depth: int = 110,
    num_classes: int = 10,
    *,
    shortcut: ShortcutKind = "subsample",
    bias: bool = False,
    survival: float = 1.0,
    mode: SurvivalMode = "batch",
    scale: SurvivalScale = "test",
    in_channels: int = 3,
) -> ResNet:
    """ResNet whose norm and ReLU stand in front of each convolution; as many parameters as :func:`resnet_cifar`.

    The sum of a block stays as it is. The stem has no norm; one stands behind the last block.

    Reference:
        K. He et al. Identity Mappings in Deep Residual Networks. ECCV 2016, arXiv:1603.05027, equation 5.

    Example:
        >>> sum(p.numel() for p in preresnet_cifar(20).parameters())
        269722
    """
    return ResNet(
        depth,
        num_classes=num_classes,
        pre_activation=True,
        shortcut=shortcut,
        bias=bias,
        survival=survival,
        mode=mode,
        scale=scale,
        in_channels=in_channels,
    )


@keeps_recipe
def stochastic_depth_cifar(
    depth: int = 110,
    num_classes: int = 10,
    survival: float = 0.5,
    *,
    pre_activation: bool = False,
    shortcut: ShortcutKind = "average",
    bias: bool = True,
    mode: SurvivalMode = "batch",
    scale: SurvivalScale = "test",
    in_channels: int = 3,
) -> ResNet:
    """The authors' network of stochastic depth: biases in convolutions, averaging shortcuts, 1,732,010 parameters.

    Args:
        depth: number of layers, 110 or 1202 in the paper.
        num_classes: outputs of the classifier.
        survival: probability that the last block is computed in training.
        pre_activation, shortcut, bias, mode, scale, in_channels: of :class:`ResNet`.

    Reference:
        G. Huang et al. Deep Networks with Stochastic Depth. ECCV 2016, arXiv:1603.09382, section 4.

    Example:
        >>> sum(p.numel() for p in stochastic_depth_cifar().parameters())
        1732010
    """
    return ResNet(
        depth,
        num_classes=num_classes,
        pre_activation=pre_activation,
        shortcut=shortcut,
        bias=bias,
        survival=survival,
        mode=mode,
        scale=scale,
        in_channels=in_channels,
    )

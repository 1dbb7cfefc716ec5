# SPDX-License-Identifier: Apache-2.0
"""ResNet in ResNet: generalised residual blocks of a residual and a transient stream.

Both streams are one tensor ``[N, 2 n, H, W]``, the residual one first, so that the four convolutions between them are
one; norm and ReLU act on each channel and therefore on each stream by itself.

Reference:
    S. Targ, D. Almeida, K. Lyman. Resnet in Resnet: Generalizing Residual Architectures. ICLR 2016 workshop,
    arXiv:1603.08029, equations 1 and 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdense.models.recipe import keeps_recipe
from fastdense.models.resnet import Shortcut
from fastdense.plain.stochastic_depth import check_choice

SHORTCUTS = ("zero_pad", "projection", "none")


class GeneralizedResidualBlock(nn.Module):
    """A residual stream ``r`` and a transient stream ``t`` of equal width, ``s`` being batch norm and ReLU.

    ``r' = s(W_rr * r + W_tr * t + shortcut(r))`` and ``t' = s(W_rt * r + W_tt * t)``.

    ``conv.weight`` is ``[[W_rr, W_tr], [W_rt, W_tt]]``. A shortcut without parameters is no addition of its own but a
    partial identity in the weight (ResNet Init), so the block costs one convolution; weight decay still
    acts on the weight without that identity.

    Args:
        in_channels, out_channels: width of each stream, ``n``.
        stride: of the convolution and the shortcut.
        shortcut: "zero_pad" keeps every ``stride``-th pixel and puts zeros in new channels, "projection" is a 1x1
            convolution where the width changes and "zero_pad" elsewhere, "none" leaves a plain convolutional layer.

    Shape:
        ``[N, 2 in_channels, H, W]`` to ``[N, 2 out_channels, ceil(H / stride), ceil(W / stride)]``.

    Raises:
        ValueError: if ``shortcut`` is unknown, or channels would have to go.

    Note:
        In bfloat16 and float16 an element of about one is rounded like an activation: to 8 or 11 bits.

    Reference:
        S. Targ et al. Resnet in Resnet. 2016, arXiv:1603.08029, equations 1 and 2, section 2.2 (ResNet Init).

    Example:
        >>> GeneralizedResidualBlock(4, 8, stride=2)(torch.zeros(2, 8, 6, 6)).shape
        torch.Size([2, 16, 3, 3])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, shortcut: str = "zero_pad") -> None:
        super().__init__()
        check_choice("GeneralizedResidualBlock", "shortcut", shortcut, SHORTCUTS)
        if out_channels < in_channels and shortcut == "zero_pad":
            raise ValueError(
                f"GeneralizedResidualBlock: expected out_channels to be at least {in_channels}, got {out_channels!r}"
            )
        projects = shortcut == "projection" and in_channels != out_channels
        self.conv = nn.Conv2d(2 * in_channels, 2 * out_channels, 3, stride=stride, padding=1, bias=False)
        self.projection = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False) if projects else None
        self.norm = nn.BatchNorm2d(2 * out_channels)
        self.in_channels = in_channels
        self.has_identity = shortcut != "none" and not projects

    def effective_weight(self) -> Tensor:
        """The weight that replaces convolution and shortcut: ``[2 out_channels, 2 in_channels, 3, 3]``.

        Where the shortcut is an identity, element ``[c, c, 1, 1]`` of every residual channel ``c`` is one larger than
        in ``conv.weight``.
        """
        if not self.has_identity:
            return self.conv.weight
        rows, columns = self.conv.weight.shape[:2]
        places = torch.arange(columns, device=self.conv.weight.device)
        ones = (places < self.in_channels).to(self.conv.weight)
        identity = F.pad(torch.diag(ones), (0, 0, 0, rows - columns))
        return self.conv.weight + F.pad(identity[:, :, None, None], (1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.effective_weight(), None, self.conv.stride, self.conv.padding)
        if self.projection is not None:
            projected = self.projection(x[:, : self.in_channels])
            y = y + F.pad(projected, (0, 0, 0, 0, 0, y.shape[1] - projected.shape[1]))
        return F.relu(self.norm(y))


class RiRBlock(nn.Module):
    """Two generalised residual blocks, and a shortcut around both for the residual stream.

    Args:
        in_channels, out_channels: width of each stream; the first block changes it.
        stride: of the second block.
        shortcut: inside the two blocks, see :class:`GeneralizedResidualBlock`.
        outer: whether there is a shortcut around both; it has no parameters. It is added behind the second ReLU.

    Shape:
        ``[N, 2 in_channels, H, W]`` to ``[N, 2 out_channels, ceil(H / stride), ceil(W / stride)]``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        shortcut: str = "zero_pad",
        outer: bool = True,
    ) -> None:
        super().__init__()
        self.layer1 = GeneralizedResidualBlock(in_channels, out_channels, 1, shortcut)
        self.layer2 = GeneralizedResidualBlock(out_channels, out_channels, stride, shortcut)
        # Zeros also stand for the transient stream, which has no shortcut.
        self.outer = Shortcut(in_channels, 2 * out_channels, stride) if outer else None
        self.in_channels = in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer2(self.layer1(x))
        return y if self.outer is None else y + self.outer(x[:, : self.in_channels])


class ResNetInResNet(nn.Module):
    """The wide 18-layer net: a stem, 2 + 3 + 3 RiR blocks, a 1x1 convolution to the classes, average pooling.

    The first block of the second and of the third stage doubles the width in its first layer and halves the image in
    its second.

    Args:
        num_classes: outputs.
        width: of each stream in the first stage.
        shortcut: "zero_pad" or "projection" inside the blocks, see :class:`GeneralizedResidualBlock`.
        outer: see :class:`RiRBlock`; without it the net is a plain one with ResNet Init.
        head_relu: whether a ReLU follows the norm of the last convolution.
        in_channels: channels of the images.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Raises:
        ValueError: if ``shortcut`` is unknown.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        width: int = 48,
        shortcut: str = "zero_pad",
        outer: bool = True,
        head_relu: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 2 * width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * width)
        blocks = []
        channels = width
        for stage, number in enumerate((2, 3, 3)):
            for index in range(number):
                stride = 2 if stage and index == 0 else 1
                blocks.append(RiRBlock(channels, width << stage, stride, shortcut=shortcut, outer=outer))
                channels = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(2 * channels, num_classes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_classes)
        self.head_relu = head_relu
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(self.blocks(x)))
        x = F.relu(x) if self.head_relu else x
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


@keeps_recipe
def resnet_in_resnet(
    num_classes: int = 10,
    width: int = 48,
    shortcut: str = "zero_pad",
    outer: bool = True,
    head_relu: bool = False,
    in_channels: int = 3,
) -> ResNetInResNet:
    """The wide 18-layer ResNet in ResNet; see :class:`ResNetInResNet`.

    Its convolutions have 9,462,048 weights, as many as those of a plain net of the same widths; with
    ``shortcut="projection"`` the net has 9,492,980 parameters at 10 classes and 9,527,720 at 100.

    Reference:
        S. Targ et al. Resnet in Resnet. 2016, arXiv:1603.08029, section 3.

    Example:
        >>> sum(p.numel() for p in resnet_in_resnet(shortcut="projection").parameters())
        9492980
    """
    return ResNetInResNet(
        num_classes, width=width, shortcut=shortcut, outer=outer, head_relu=head_relu, in_channels=in_channels
    )

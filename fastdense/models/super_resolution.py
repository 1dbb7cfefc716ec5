# SPDX-License-Identifier: Apache-2.0
"""Super-resolution networks before dense blocks, and what all such networks have in common."""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdense.nn.dense_block import DenseFeatures
from fastdense.nn.resample import BicubicUpsample
from fastdense.nn.sr_dense_block import ConvRelu, SRDenseBlock
from fastdense.nn.structure import NotFusible, check_no_global_hooks, is_quiet

# Rows of a stripe whose tail is computed again in the backward pass: large beside the halo.
_RECOMPUTED_ROWS = 24


class Stripe(NamedTuple):
    """Rows ``[start, stop)``, and ``[low, high)`` with a halo as far as there are rows."""

    start: int
    stop: int
    low: int
    high: int


def stripes(first: int, last: int, rows: int, halo: int, height: int) -> Iterator[Stripe]:
    """Cuts rows ``[first, last)`` of ``height`` into stripes of ``rows``."""
    for start in range(first, last, rows):
        stop = min(start + rows, last)
        yield Stripe(start, stop, max(0, start - halo), min(height, stop + halo))


class SuperResolutionNet(nn.Module):
    """A network from small to large pictures, in two parts: ``forward(x) = tail(trunk(x))``.

    The trunk works at the size of the input, or smaller. The tail enlarges; every one of its rows depends on few rows
    of its input, so that :func:`fastdense.upscale` can run it in stripes.

    Attributes:
        scale: how much larger the result is.
        colours: channels of a picture: 3 for RGB, 1 for the luminance alone.
        halo: rows that a stripe of the tail needs beyond its own on either side, counted in the tail's input.
        tail_scale: how much larger the result is than the tail's input.
        reach: rows that the trunk sees beyond a row of its result on either side.
        unshuffle: how much smaller the trunk's features are than the pictures.
        recompute_tail: whether the tail keeps nothing for the backward pass but runs again there, stripe by stripe.
    """

    scale: int
    colours: int
    halo: int
    tail_scale: int
    reach: int = 0
    unshuffle: int = 1
    recompute_tail: bool = False

    def live_values(self) -> tuple[int, int]:
        """Numbers per pixel of the trunk's features that trunk and tail hold at once, at most."""
        raise NotImplementedError

    def parts(self) -> list[nn.Module]:
        """Modules of the trunk that run one after another, each for about as long, to show progress by."""
        return []

    def settings(self) -> dict[str, Any]:
        """What :func:`save_super_resolution` writes because the weights do not tell it."""
        return {"scale": self.scale}

    def trunk(self, x: Tensor) -> Tensor:
        """Features ``[N, C, H, W]`` of pictures in [0, 1]; here the pictures themselves."""
        return x

    def tail(self, x: Tensor) -> Tensor:
        """Large pictures of features."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x)
        out = self._recomputed_tail(features) if self._recomputes() else self.tail(features)
        return out[..., : self.scale * x.shape[-2], : self.scale * x.shape[-1]]

    def _recomputes(self) -> bool:
        """Whether the tail may run in stripes and twice: nobody watches its modules, and the engine can take it."""
        if not (self.recompute_tail and self.training and torch.is_grad_enabled()):
            return False
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            return False
        try:
            check_no_global_hooks()
        except NotFusible:
            return False
        trunk = set(self.parts())
        around = [child for child in self.children() if trunk.isdisjoint(child.children())]
        return all(is_quiet(module) for child in around for module in child.modules())

    def _recomputed_tail(self, features: Tensor) -> Tensor:
        height, scale, made = features.shape[2], self.tail_scale, []
        for s in stripes(0, height, _RECOMPUTED_ROWS, self.halo, height):
            around = features[:, :, s.low : s.high]
            out = checkpoint(self.tail, around, use_reentrant=False, preserve_rng_state=False)
            made.append(out[:, :, (s.start - s.low) * scale : (s.stop - s.low) * scale])
        return torch.cat(made, 2)


def conv3x3(in_channels: int, out_channels: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


def check_scale(op: str, scale: int, known: tuple[int, ...] = (2, 3, 4)) -> int:
    if scale not in known:
        raise ValueError(f"{op}: expected scale to be one of {', '.join(map(str, known))}, got {scale!r}")
    return scale


def pixel_shuffles(channels: int, scale: int) -> nn.Sequential:
    """Enlarges by convolutions to more channels, which then become pixels; twice by 2 for 4."""
    layers: list[nn.Module] = []
    for factor in (2, 2) if scale == 4 else (scale,):
        layers += [conv3x3(channels, channels * factor**2), nn.PixelShuffle(factor)]
    return nn.Sequential(*layers)


class EnlargedFirst(SuperResolutionNet):
    """A network on pictures that bicubic resampling has enlarged; subclasses say what happens then.

    ``reach`` is how far its convolutions see, in pixels of the result.
    """

    colours = 1

    def __init__(self, scale: int, reach: int) -> None:
        super().__init__()
        self.scale = self.tail_scale = check_scale(type(self).__name__, scale)
        self.halo = -(-reach // scale) + 2  # and two rows for the cubic
        self.upsample = BicubicUpsample(scale, preset="matlab")

    def live_values(self) -> tuple[int, int]:
        widest = max(m.weight.shape[0] for m in self.modules() if isinstance(m, nn.Conv2d))
        return 1, 3 * widest * self.scale**2

    def refine(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def tail(self, x: Tensor) -> Tensor:
        return self.refine(self.upsample(x))


class SRCNN(EnlargedFirst):
    """Three convolutions on an enlarged picture: ``conv(relu(conv(relu(conv(bicubic(x))))))``.

    Args:
        scale: 2, 3 or 4.
        kernels: sizes of the kernels; (9, 1, 5) and (9, 5, 5) are published.
        widths: channels of the two hidden layers.

    Shape:
        ``[N, 1, H, W]`` to ``[N, 1, scale * H, scale * W]``, luminance in [0, 1]. Borders are padded by zeros. With
        random weights the result is nearly the bicubic picture.

    Reference:
        C. Dong, C. C. Loy, K. He, X. Tang. Image Super-Resolution Using Deep Convolutional Networks. TPAMI 2016,
        arXiv:1501.00092, equations 1 to 3.

    Example:
        >>> SRCNN(scale=2)(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 1, 16, 16])
    """

    def __init__(
        self, scale: int = 2, kernels: tuple[int, int, int] = (9, 1, 5), widths: tuple[int, int] = (64, 32)
    ) -> None:
        if len(kernels) != 3 or any(k < 1 or k % 2 == 0 for k in kernels):
            raise ValueError(f"SRCNN: expected kernels to be three odd sizes, got {kernels!r}")
        super().__init__(scale, sum(k // 2 for k in kernels))
        channels = (1, *widths, 1)
        for at, kernel in enumerate(kernels):
            conv = nn.Conv2d(channels[at], channels[at + 1], kernel, padding=kernel // 2)
            self.add_module(f"conv{at + 1}", conv)
            _hand_through(conv)
        nn.init.normal_(conv.weight[:, 1:], std=1e-3)

    def refine(self, x: Tensor) -> Tensor:
        first, second, last = (cast(nn.Conv2d, self._modules[f"conv{at}"]) for at in (1, 2, 3))
        return last(torch.relu(second(torch.relu(first(x)))))


@torch.no_grad()
def _hand_through(conv: nn.Conv2d) -> None:
    """Makes the first channel that of the input, so that a network of such convolutions begins as the identity."""
    middle = conv.kernel_size[0] // 2
    conv.weight[0].zero_()
    conv.weight[0, 0, middle, middle] = 1
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]


class VDSR(EnlargedFirst):
    """Twenty 3x3 convolutions that add to an enlarged picture what it lacks: ``y + convs(y)``, ``y = bicubic(x)``.

    Args:
        scale: 2, 3 or 4.
        depth: number of convolutions.
        width: channels between them.

    Shape:
        ``[N, 1, H, W]`` to ``[N, 1, scale * H, scale * W]``, luminance in [0, 1].

    Reference:
        J. Kim, J. K. Lee, K. M. Lee. Accurate Image Super-Resolution Using Very Deep Convolutional Networks. CVPR 2016,
        arXiv:1511.04587, section 3.1.
    """

    def __init__(self, scale: int = 2, depth: int = 20, width: int = 64) -> None:
        if depth < 2:
            raise ValueError(f"VDSR: expected depth to be at least 2, got {depth!r}")
        super().__init__(scale, depth)
        channels = [1, *[width] * (depth - 1), 1]
        self.convs = nn.ModuleList(conv3x3(channels[at], channels[at + 1], bias=False) for at in range(depth))
        for conv in self.convs:
            nn.init.kaiming_normal_(cast(nn.Conv2d, conv).weight, nonlinearity="relu")

    def refine(self, x: Tensor) -> Tensor:
        *hidden, last = self.convs
        y = x
        for conv in hidden:
            y = torch.relu(conv(y))
        return x + last(y)


class DRCN(EnlargedFirst):
    """One convolution applied again and again, every state of which is reconstructed.

    With ``y = bicubic(x)``: ``h_0 = embed(y)``, ``h_d = relu(recursive(h_{d-1}))``, and the result is the mean of
    ``y + reconstruct(h_d)`` over ``d = 1 ... D`` with learned weights. In terms of
    :class:`fastdense.nn.HigherOrderNet` the states are a recurrence of order 1 in which all ``f`` and all ``g`` are
    shared.

    Args:
        scale: 2, 3 or 4.
        recursions: times ``D`` that the shared convolution is applied.
        width: channels of the states.

    Shape:
        ``[N, 1, H, W]`` to ``[N, 1, scale * H, scale * W]``, luminance in [0, 1].

    Reference:
        J. Kim, J. K. Lee, K. M. Lee. Deeply-Recursive Convolutional Network for Image Super-Resolution. CVPR 2016,
        arXiv:1511.04491, equations 2 to 8.
    """

    def __init__(self, scale: int = 2, recursions: int = 16, width: int = 256) -> None:
        if recursions < 1:
            raise ValueError(f"DRCN: expected recursions to be positive, got {recursions!r}")
        super().__init__(scale, recursions + 4)
        self.embed = nn.Sequential(conv3x3(1, width, False), nn.ReLU(), conv3x3(width, width, False), nn.ReLU())
        self.recursive = conv3x3(width, width, False)
        self.reconstruct = nn.Sequential(conv3x3(width, width, False), nn.ReLU(), conv3x3(width, 1, False))
        self.weights = nn.Parameter(torch.full((recursions,), 1 / recursions))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def live_values(self) -> tuple[int, int]:
        return 1, (len(self.weights) + 3) * self.recursive.out_channels * self.scale**2

    def states(self, y: Tensor) -> list[Tensor]:
        """``h_0 ... h_D`` of an enlarged picture."""
        states = [self.embed(y)]
        for _ in range(len(self.weights)):
            states.append(torch.relu(self.recursive(states[-1])))
        return states

    def supervised(self, y: Tensor) -> list[Tensor]:
        """The picture that every recursion makes: what the recursive supervision compares."""
        return [y + self.reconstruct(h) for h in self.states(y)[1:]]

    def refine(self, x: Tensor) -> Tensor:
        total = self.weights.sum()
        pictures = self.supervised(x)
        return sum(
            (w / total * picture for w, picture in zip(self.weights, pictures, strict=True)), torch.zeros_like(x)
        )


# RGB of the pictures that EDSR was trained on: subtracted in front and added behind; inside, values go to 255.
_DIV2K_MEAN = (0.4488, 0.4371, 0.4040)


class ResidualBlock(nn.Module):
    """``x + scale * conv2(relu(conv1(x)))``, no norm."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3x3(width, width), conv3x3(width, width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.conv2(torch.relu(self.conv1(x)))


class EDSR(SuperResolutionNet):
    """Residual blocks without norms, then pixel shuffle.

    Args:
        scale: 2, 3 or 4.
        blocks: number of residual blocks.
        width: channels.
        residual_scale: factor of every residual; 0.1 in the large network.

    Shape:
        ``[N, 3, H, W]`` to ``[N, 3, scale * H, scale * W]``, RGB in [0, 1].

    Reference:
        B. Lim, S. Son, H. Kim, S. Nah, K. M. Lee. Enhanced Deep Residual Networks for Single Image Super-Resolution.
        CVPRW 2017, arXiv:1707.02921, table 1.
    """

    colours = 3
    halo = 2
    mean: Tensor

    def __init__(
        self,
        scale: int = 4,
        blocks: int = 16,
        width: int = 64,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = self.tail_scale = check_scale("EDSR", scale)
        self.register_buffer("mean", torch.tensor(_DIV2K_MEAN).view(1, 3, 1, 1), persistent=False)
        self.conv_first = conv3x3(3, width)
        self.body = nn.Sequential(*(ResidualBlock(width, residual_scale) for _ in range(blocks)))
        self.conv_after_body = conv3x3(width, width)
        self.upsample = pixel_shuffles(width, scale)
        self.conv_last = conv3x3(width, 3)
        self.reach = 2 * blocks + 2
        self.residual_scale = residual_scale

    def parts(self) -> list[nn.Module]:
        return list(self.body)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "residual_scale": self.residual_scale}

    def live_values(self) -> tuple[int, int]:
        width = self.conv_last.in_channels
        return 4 * width, 3 * width * self.scale**2

    def trunk(self, x: Tensor) -> Tensor:
        first = self.conv_first((x - self.mean) * 255)
        return first + self.conv_after_body(self.body(first))

    def tail(self, x: Tensor) -> Tensor:
        return self.conv_last(self.upsample(x)) / 255 + self.mean


class SRDenseNet(SuperResolutionNet):
    """Dense blocks whose outputs all reach a bottleneck, then transposed convolutions: SRDenseNet_All.

    Args:
        blocks: number of dense blocks.
        layers: convolutions of a block.
        growth_rate: channels that each of them adds.
        width: channels of the bottleneck and behind it.

    Shape:
        ``[N, 1, H, W]`` to ``[N, 1, 4 * H, 4 * W]``, luminance in [0, 1].

    Reference:
        T. Tong, G. Li, X. Liu, Q. Gao. Image Super-Resolution Using Dense Skip Connections. ICCV 2017, section 3.
    """

    scale = tail_scale = 4
    colours = 1
    halo = 1

    def __init__(self, blocks: int = 8, layers: int = 8, growth_rate: int = 16, width: int = 256) -> None:
        super().__init__()
        features = layers * growth_rate
        self.conv = ConvRelu(1, features)
        self.dense_blocks = DenseFeatures(
            *(SRDenseBlock(features * (at + 1), growth_rate, layers) for at in range(blocks))
        )
        self.bottleneck = nn.Sequential(nn.Conv2d(features * (blocks + 1), width, 1), nn.ReLU())
        up = [nn.ConvTranspose2d(width, width, 3, 2, padding=1, output_padding=1) for _ in range(2)]
        self.deconv = nn.Sequential(up[0], nn.ReLU(), up[1], nn.ReLU())
        self.reconstruction = conv3x3(width, 1)
        self.reach = 1 + blocks * layers

    def parts(self) -> list[nn.Module]:
        return list(self.dense_blocks)

    def live_values(self) -> tuple[int, int]:
        conv = cast(nn.Conv2d, self.bottleneck[0])
        return 2 * conv.in_channels, 3 * conv.out_channels * self.scale**2

    def trunk(self, x: Tensor) -> Tensor:
        return self.bottleneck(self.dense_blocks(self.conv(x)))

    def tail(self, x: Tensor) -> Tensor:
        return self.reconstruction(self.deconv(x))


def srcnn(scale: int = 2, kernels: tuple[int, int, int] = (9, 1, 5)) -> SRCNN:
    """SRCNN 9-1-5 (8,129 parameters), or 9-5-5 with ``kernels=(9, 5, 5)`` (57,281)."""
    return SRCNN(scale, kernels)


def vdsr(scale: int = 2, depth: int = 20) -> VDSR:
    """VDSR of 20 convolutions."""
    return VDSR(scale, depth)


def drcn(scale: int = 2, recursions: int = 16, width: int = 256) -> DRCN:
    """DRCN with 16 recursions of 256 channels."""
    return DRCN(scale, recursions, width)


def edsr_baseline(scale: int = 4, blocks: int = 16, width: int = 64) -> EDSR:
    """EDSR-baseline: 16 blocks of 64 channels."""
    return EDSR(scale, blocks, width)


def edsr(scale: int = 4, blocks: int = 32, width: int = 256) -> EDSR:
    """EDSR: 32 blocks of 256 channels, residuals scaled by 0.1."""
    return EDSR(scale, blocks, width, 0.1)


def srdensenet(blocks: int = 8, growth_rate: int = 16) -> SRDenseNet:
    """SRDenseNet_All for a scale of 4."""
    return SRDenseNet(blocks, growth_rate=growth_rate)

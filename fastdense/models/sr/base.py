# SPDX-License-Identifier: Apache-2.0
"""What super-resolution networks share: the base class, stripes of a picture, and helpers to build one."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdense.fusion.checks import NotFusible, check_no_global_hooks, has_no_hooks
from fastdense.nn.resample import BicubicUpsample

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
        out_colours: channels of the result, as many unless the network says otherwise.
        halo: rows that a stripe of the tail needs beyond its own on either side, counted in the tail's input.
        tail_scale: how much larger the result is than the tail's input.
        reach: rows that the trunk sees beyond a row of its result on either side.
        unshuffle: how much smaller the trunk's features are than the pictures.
        recompute_tail: whether the tail saves nothing for backward, and runs again there stripe by stripe.
        stripes_exactly: whether stripes give the same result as the whole picture.
        notes: what weights left open and :func:`load_super_resolution` chose, a sentence each.
    """

    scale: int
    colours: int
    halo: int
    tail_scale: int
    reach: int = 0
    unshuffle: int = 1
    recompute_tail: bool = False
    stripes_exactly: bool = True
    notes: tuple[str, ...] = ()

    @property
    def out_colours(self) -> int:
        return self.colours

    def live_values(self) -> tuple[int, int]:
        """Numbers per pixel of the trunk's features that trunk and tail hold at once, at most."""
        raise NotImplementedError

    def parts(self) -> list[nn.Module]:
        """Modules of the trunk that run one after another, each for about as long, to show progress by."""
        return []

    def settings(self) -> dict[str, Any]:
        """The arguments that make the same network again, with other weights."""
        raise NotImplementedError

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
        return all(has_no_hooks(module) for child in around for module in child.modules())

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


class UpscaledFirst(SuperResolutionNet):
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


def check_rgb_range(op: str, value: float) -> float:
    if value not in (1, 255):
        raise ValueError(f"{op}: expected rgb_range to be 1 or 255, got {value!r}")
    return value


class ResidualBlock(nn.Module):
    """``x + scale * conv2(relu(conv1(x)))``, no norm."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3x3(width, width), conv3x3(width, width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.conv2(torch.relu(self.conv1(x)))

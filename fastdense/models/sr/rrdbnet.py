# SPDX-License-Identifier: Apache-2.0
"""RRDBNet: the generator of ESRGAN and Real-ESRGAN."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdense.models.sr.base import SuperResolutionNet, check_scale, conv3x3
from fastdense.nn.residual_dense_block import ResidualDenseBlock

_SLOPE = 0.2


class RRDB(nn.Module):
    """Three residual dense blocks and a residual sum: ``x + 0.2 * rdb3(rdb2(rdb1(x)))``."""

    def __init__(self, channels: int = 64, growth_rate: int = 32) -> None:
        super().__init__()
        self.growth_rate = growth_rate
        for name in ("rdb1", "rdb2", "rdb3"):
            block = ResidualDenseBlock(channels, growth_rate, negative_slope=_SLOPE)
            self.add_module(name, block)

    def forward(self, x: Tensor) -> Tensor:
        rdb1, rdb2, rdb3 = self.children()
        return rdb3(rdb2(rdb1(x)), x)  # the last block adds x itself


class RRDBNet(SuperResolutionNet):
    """Residual-in-residual dense blocks, then nearest-neighbour enlargement with convolutions.

    ``f = conv_first(x)``, ``f + conv_body(body(f))``, then per doubling ``lrelu(conv_up(nearest(.)))``, and
    ``conv_last(lrelu(conv_hr(.)))``. For a scale below 4 the input's pixels become channels first, so that the body
    works on smaller pictures.

    Args:
        scale: 1, 2, 4 or 8.
        blocks: number of RRDBs.
        width: channels between them.
        growth_rate: channels that a layer of a dense block adds.
        in_channels, out_channels: of the pictures.
        unshuffle: factor by which pixels become channels; None takes 4 for a scale of 1, 2 for 2, else 1.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, out_channels, scale * H, scale * W]``, RGB in [0, 1]. With ``unshuffle``,
        pictures of other sizes than its multiples are reflected at their lower and right edges, and the surplus is cut
        off again.

    Note:
        The tail has ``scale**2`` times as many features as the body. In training it saves nothing for backward, and
        runs again there in stripes of rows. ``recompute_tail = False`` turns that off, and so do hooks on its modules.

    Reference:
        X. Wang et al. ESRGAN: Enhanced Super-Resolution Generative Adversarial Networks. ECCVW 2018, arXiv:1809.00219,
        section 3.1; X. Wang et al. Real-ESRGAN. ICCVW 2021, arXiv:2107.10833, section 3.3 (unshuffle).

    Example:
        >>> import torch
        >>> RRDBNet(scale=4, blocks=1)(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 3, 32, 32])
    """

    halo = 2
    recompute_tail = True

    def __init__(
        self,
        scale: int = 4,
        blocks: int = 23,
        width: int = 64,
        growth_rate: int = 32,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        unshuffle: int | None = None,
    ) -> None:
        super().__init__()
        self.scale = check_scale("RRDBNet", scale, (1, 2, 4, 8))
        self.unshuffle = {1: 4, 2: 2}.get(scale, 1) if unshuffle is None else unshuffle
        if self.unshuffle not in (1, 2, 4):
            raise ValueError(f"RRDBNet: expected unshuffle to be 1, 2 or 4, got {unshuffle!r}")
        self.colours = in_channels
        self.tail_scale = self.scale * self.unshuffle
        self.conv_first = conv3x3(in_channels * self.unshuffle**2, width)
        self.body = nn.Sequential(*(RRDB(width, growth_rate) for _ in range(blocks)))
        self.conv_body = conv3x3(width, width)
        self.doublings = self.tail_scale.bit_length() - 1
        for at in range(self.doublings):
            self.add_module(f"conv_up{at + 1}", conv3x3(width, width))
        self.conv_hr = conv3x3(width, width)
        self.conv_last = conv3x3(width, out_channels)
        for module in self.body.modules():
            if isinstance(module, nn.Conv2d):  # small residuals at first: section 3.1 of the paper
                nn.init.kaiming_normal_(module.weight)
                module.weight.data *= 0.1
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

        self.reach = 15 * blocks + 2

    @property
    def out_colours(self) -> int:
        return self.conv_last.out_channels

    def parts(self) -> list[nn.Module]:
        return list(self.body)

    def settings(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "blocks": len(self.body),
            "width": self.conv_last.in_channels,
            "growth_rate": cast(RRDB, self.body[0]).growth_rate if len(self.body) else 1,
            "in_channels": self.colours,
            "out_channels": self.out_colours,
            "unshuffle": self.unshuffle,
        }

    def live_values(self) -> tuple[int, int]:
        width, growth = self.conv_last.in_channels, cast(RRDB, self.body[0]).growth_rate if len(self.body) else 0
        return 6 * width + 4 * growth, 3 * width * self.tail_scale**2

    def trunk(self, x: Tensor) -> Tensor:
        if self.unshuffle > 1:
            below, right = (-size % self.unshuffle for size in x.shape[2:])
            mode = "reflect" if below < x.shape[2] and right < x.shape[3] else "replicate"
            x = F.pixel_unshuffle(F.pad(x, (0, right, 0, below), mode=mode), self.unshuffle)
        first = self.conv_first(x.contiguous(memory_format=torch.channels_last))  # as the blocks' operators have it
        return first + self.conv_body(self.body(first))

    def tail(self, x: Tensor) -> Tensor:
        for at in range(self.doublings):
            conv = cast(nn.Conv2d, self._modules[f"conv_up{at + 1}"])
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2.0)), _SLOPE, inplace=True)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), _SLOPE, inplace=True))


def rrdbnet(scale: int = 4, blocks: int = 23, width: int = 64) -> RRDBNet:
    """RRDBNet of 23 blocks (ESRGAN, Real-ESRGAN x4plus), or of 6 (x4plus_anime_6B)."""
    return RRDBNet(scale, blocks, width)

# SPDX-License-Identifier: Apache-2.0
"""RDN: residual dense network."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdense.models.sr.base import SuperResolutionNet, check_rgb_range, check_scale, conv3x3, pixel_shuffles
from fastdense.nn.residual_dense_block import ResidualDenseBlock


class RDN(SuperResolutionNet):
    """Residual dense blocks whose outputs are all fused, then pixel shuffle.

    ``f = sfe2(sfe1(x))``, ``f_d = rdb_d(f_{d-1})``, ``sfe1(x) + gff([f_1 ... f_D])``, then enlargement and a last
    convolution.

    Args:
        scale: 2, 3 or 4.
        blocks: number ``D`` of residual dense blocks.
        layers: convolutions ``C`` of a block.
        growth_rate: channels ``G`` that each of them adds.
        width: channels ``G0`` between blocks.
        rgb_range: what stands for 1 inside: 255 in the authors' later code, EDSR-PyTorch.

    Shape:
        ``[N, 3, H, W]`` to ``[N, 3, scale * H, scale * W]``, RGB in [0, 1].

    Reference:
        Y. Zhang, Y. Tian, Y. Kong, B. Zhong, Y. Fu. Residual Dense Network for Image Super-Resolution. CVPR 2018,
        arXiv:1802.08797, equations 1 to 9.

    Example:
        >>> RDN(scale=2, blocks=2, layers=2)(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 3, 16, 16])
    """

    colours = 3
    halo = 2
    rgb_range: float = 1

    def __init__(
        self,
        scale: int = 4,
        blocks: int = 16,
        layers: int = 8,
        growth_rate: int = 64,
        width: int = 64,
        rgb_range: float = 1,
    ) -> None:
        super().__init__()
        self.rgb_range = check_rgb_range("RDN", rgb_range)
        self.scale = self.tail_scale = check_scale("RDN", scale)
        self.sfe1, self.sfe2 = conv3x3(3, width), conv3x3(width, width)
        self.rdbs = nn.ModuleList(
            ResidualDenseBlock(width, growth_rate, layers, negative_slope=0.0, fusion_kernel=1, scale=1.0)
            for _ in range(blocks)
        )
        self.gff = nn.Sequential(nn.Conv2d(width * blocks, width, 1), conv3x3(width, width))
        self.upscale = pixel_shuffles(width, scale)
        self.output = conv3x3(width, 3)
        self.reach = blocks * layers + 3

    def parts(self) -> list[nn.Module]:
        return list(self.rdbs)

    def settings(self) -> dict[str, Any]:
        convs = [conv for conv in self.rdbs[0].modules() if isinstance(conv, nn.Conv2d)]
        return {
            "scale": self.scale,
            "blocks": len(self.rdbs),
            "layers": len(convs) - 1,
            "growth_rate": convs[0].out_channels,
            "width": self.output.in_channels,
            "rgb_range": self.rgb_range,
        }

    def live_values(self) -> tuple[int, int]:
        fusion = cast(nn.Conv2d, self.gff[0])  # its input exists twice: in parts and concatenated
        width = fusion.out_channels
        return 2 * fusion.in_channels + 4 * width, 5 * width * self.scale**2

    def trunk(self, x: Tensor) -> Tensor:
        x = x if self.rgb_range == 1 else x * self.rgb_range
        shallow = self.sfe1(x.contiguous(memory_format=torch.channels_last))  # as the blocks' operators have it
        y, levels = self.sfe2(shallow), []
        for rdb in self.rdbs:
            y = rdb(y)
            levels.append(y)
        return shallow + self.gff(torch.cat(levels, 1))

    def tail(self, x: Tensor) -> Tensor:
        out = self.output(self.upscale(x))
        return out if self.rgb_range == 1 else out / self.rgb_range


def rdn(scale: int = 4, blocks: int = 16, layers: int = 8, width: int = 64) -> RDN:
    """RDN of 16 blocks with 8 convolutions, growth rate 64."""
    return RDN(scale, blocks, layers, width, width)

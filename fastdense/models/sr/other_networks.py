# SPDX-License-Identifier: Apache-2.0
"""Networks that spandrel knows and this library does not: SRVGGNet, SwinIR, DAT and others run through it."""

import contextlib
import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastdense.fusion.convert import convert
from fastdense.models.sr.base import SuperResolutionNet
from fastdense.models.sr.weight_files import State

# Rows of a stripe's surroundings where no number of them is exact.
_OVERLAP = 32
# A network is taken to hold so many numbers for each channel of its widest layer and pixel.
_LIVE = 8


class OtherNet(SuperResolutionNet):
    """A network of spandrel. All of it is the tail; it runs in stripes only where memory asks for it.

    Args:
        descriptor: what spandrel made of the weights.

    Shape:
        ``[N, C, H, W]`` to ``[N, C', scale * H, scale * W]``, in [0, 1]. Pictures of sizes that the network does not
        take are reflected at their lower and right edges, and the surplus is cut off again.
    """

    def __init__(self, descriptor: Any) -> None:
        super().__init__()
        self.model: nn.Module = descriptor.model
        self.scale = self.tail_scale = descriptor.scale
        self.colours, self._out_colours = descriptor.input_channels, descriptor.output_channels
        self._size, self._call = descriptor.size_requirements, descriptor._call_fn
        convs = [m for m in self.model.modules() if isinstance(m, nn.Conv2d)]
        self.stripes_exactly = descriptor.architecture.id == "Compact"  # nothing but 3x3 convolutions
        self.halo = len(convs) if self.stripes_exactly else _OVERLAP
        name = descriptor.architecture.name
        self.notes = (f"{name} runs through spandrel",)
        if not self.stripes_exactly:
            self.notes += (f"stripes of {name}, where --max-memory asks for them, overlap and are not exact",)

    @property
    def out_colours(self) -> int:
        return self._out_colours

    def live_values(self) -> tuple[int, int]:
        weights = [p for p in self.model.parameters() if p.dim() >= 2]
        widest = max((p.shape[0] for p in weights), default=1)
        return self.colours, _LIVE * max(widest, self.out_colours * self.scale**2)

    def settings(self) -> dict[str, Any]:
        raise ValueError("save_super_resolution: expected a network of this library, got one of spandrel")

    def tail(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = _padded(x, *self._size.get_padding(width, height))
        return self._call(self.model, x)[..., : self.scale * height, : self.scale * width]


def _padded(x: Tensor, right: int, lower: int) -> Tensor:
    """Reflected at its edges, again and again where it is small; what is one pixel wide is repeated."""
    while right or lower:
        columns, rows = min(right, x.shape[3] - 1), min(lower, x.shape[2] - 1)
        if not columns and not rows:
            return F.pad(x, (0, right, 0, lower), "replicate")
        x = F.pad(x, (0, columns, 0, rows), "reflect")
        right, lower = right - columns, lower - rows
    return x


def make_other_network(state: State) -> OtherNet | None:
    """A network of spandrel with its weights, converted where blocks are found; None if spandrel does not know it.

    Raises:
        ImportError: spandrel is not installed.
        ValueError: the network makes no picture of one picture.
    """
    import spandrel

    try:
        descriptor = spandrel.ModelLoader().load_from_state_dict(dict(state))
    except spandrel.UnsupportedModelError:
        return None
    if not isinstance(descriptor, spandrel.ImageModelDescriptor):
        raise ValueError(f"a network from one picture to another, got {descriptor.architecture.name}")
    net = OtherNet(descriptor).eval().float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ValueError):  # no such block
            convert(net.model)
    return net

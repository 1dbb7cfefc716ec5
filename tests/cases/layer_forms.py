# SPDX-License-Identifier: Apache-2.0
"""Layers of dense blocks in the orders, sizes and calls that people write; blocks that concatenate what they make."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

C0, K, WIDTH = 6, 4, 8


def norm_act(channels: int, growth: int = K, kernel: int = 3, dilation: int = 1) -> nn.Module:
    """Norm, activation, 1x1, norm, activation, convolution."""
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, WIDTH, 1, bias=False),
        nn.BatchNorm2d(WIDTH), nn.ReLU(),
        nn.Conv2d(WIDTH, growth, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False),
    )  # fmt: skip


def no_bottleneck(channels: int, growth: int = K, kernel: int = 3, dilation: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, growth, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False),
    )  # fmt: skip


def act_norm(channels: int, growth: int = K) -> nn.Module:
    """Norms that take the statistics of what the activation makes."""
    return nn.Sequential(
        nn.LeakyReLU(0.1), nn.BatchNorm2d(channels), nn.Conv2d(channels, WIDTH, 1, bias=False),
        nn.LeakyReLU(0.1), nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, growth, 3, padding=1),
    )  # fmt: skip


def post_activation(channels: int, growth: int = K) -> nn.Module:
    """Convolution, norm, activation."""
    return nn.Sequential(
        nn.Conv2d(channels, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True),
        nn.Conv2d(WIDTH, growth, 3, padding=1, bias=False), nn.BatchNorm2d(growth), nn.ReLU(inplace=True),
    )  # fmt: skip


def post_activation_no_bottleneck(channels: int, growth: int = K) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, growth, 3, padding=1), nn.InstanceNorm2d(growth, affine=True), nn.SiLU())


def both_norms(channels: int, growth: int = K) -> nn.Module:
    """A norm of the batch and one of single samples."""
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, WIDTH, 1, bias=False),
        nn.GroupNorm(2, WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, growth, 3, padding=1, bias=False),
    )  # fmt: skip


class SqueezeExcite(nn.Module):
    """A factor for each channel, of its mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 4, 2)
        self.fc = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]


class BlockAttention(nn.Module):
    """CBAM: a factor for each channel, of its mean and maximum, then one for each pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 4, 2)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, channels, 1, bias=False)
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.mlp(x.mean((2, 3), keepdim=True)) + self.mlp(x.amax((2, 3), keepdim=True))
        x = x * torch.sigmoid(pooled)
        return x * torch.sigmoid(self.spatial(torch.cat([x.mean(1, True), x.amax(1, True)], 1)))


def with_attention(
    channels: int, growth: int = K, *, attention: Callable[[int], nn.Module], width: int = WIDTH
) -> nn.Module:
    """A layer with attention to its new features."""
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, width, 1, bias=False),
        nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, growth, 3, padding=1, bias=False),
        attention(growth),
    )  # fmt: skip


class Checkpointed(nn.Module):
    """A layer that runs again in the backward pass."""

    def __init__(self, channels: int, growth: int = K, *, make: Callable = norm_act, use_reentrant: bool) -> None:
        super().__init__()
        self.body = make(channels, growth)
        self.use_reentrant = use_reentrant
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant) if self.active else self.body(x)


class Block(nn.Module):
    """Concatenates a list of features in front of every layer."""

    def __init__(
        self, make: Callable[..., nn.Module] = norm_act, growths: tuple[int, ...] = (K, K, K), channels: int = C0
    ) -> None:
        super().__init__()
        self.units = nn.ModuleList(make(channels + sum(growths[:at]), k) for at, k in enumerate(growths))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for unit in self.units:
            features.append(unit(torch.cat(features, 1)))
        return torch.cat(features, 1)


FORMS: dict[str, Callable[[int], nn.Module]] = {
    "norm, act": norm_act,
    "no 1x1": no_bottleneck,
    **{f"kernel {kernel}": partial(norm_act, kernel=kernel) for kernel in (1, 5, 7)},
    **{f"no 1x1, kernel {kernel}": partial(no_bottleneck, kernel=kernel) for kernel in (1, 5, 7)},
    "dilation": partial(norm_act, dilation=2),
    "no 1x1, dilation": partial(no_bottleneck, dilation=3),
    "act, norm": act_norm,
    "post-activation": post_activation,
    "post-activation, no 1x1": post_activation_no_bottleneck,
    "both norms": both_norms,
    "squeeze and excite": partial(with_attention, attention=SqueezeExcite),
    "attention": partial(with_attention, attention=BlockAttention),
    "reentrant": partial(Checkpointed, use_reentrant=True),
    "non-reentrant": partial(Checkpointed, use_reentrant=False),
    "reentrant, post-activation": partial(Checkpointed, make=post_activation, use_reentrant=True),
    "non-reentrant, post-activation": partial(Checkpointed, make=post_activation, use_reentrant=False),
}


def attentive_net(attention: Callable[[int], nn.Module], growth: int = 12) -> nn.Module:
    """A DenseNet of two blocks, with attention in its layers and behind its transition."""
    layer = partial(with_attention, attention=attention, width=4 * growth)
    channels = [2 * growth + growth * at for at in range(17)]
    blocks = [Block(layer, (growth,) * layers, first) for layers, first in ((8, channels[0]), (12, channels[4]))]
    return nn.Sequential(
        nn.Conv2d(3, channels[0], 3, padding=1),
        blocks[0],
        nn.Sequential(
            nn.BatchNorm2d(channels[8]), nn.ReLU(), nn.Conv2d(channels[8], channels[4], 1), attention(channels[4]),
            nn.AvgPool2d(2),
        ),
        blocks[1],
        nn.BatchNorm2d(channels[16]), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(channels[16], 5),
    )  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""Dense blocks whose layers compute what no operator of this library does."""

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

C0, K = 6, 4


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 2), nn.Linear(2, channels)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.sigmoid(self.fc2(F.silu(self.fc1(x.flatten(2).mean(2)))))
        return x * weights.view(*weights.shape, *[1] * (x.dim() - 2))


class Layer(nn.Module):
    """Returns the new features alone."""

    def __init__(self, channels: int, dims: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.body = nn.Sequential(
            norm(channels), nn.ReLU(inplace=True), conv(channels, 8, 1), norm(8), nn.GELU(), conv(8, K, 3, padding=1)
        )
        self.excite = SqueezeExcite(K)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.excite(self.body(x))


class InPlaceLayer(Layer):
    """Its first operation changes what it is given."""

    def __init__(self, channels: int, dims: int = 2) -> None:
        super().__init__(channels, dims)
        self.body = nn.Sequential(nn.ReLU(inplace=True), *self.body[2:])


class DropPathLayer(Layer):
    def __init__(self, channels: int, dims: int = 2) -> None:
        super().__init__(channels, dims)
        self.drop_path, self.drop = timm.layers.DropPath(0.5), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.drop(super().forward(x)))


class DepthwiseLayer(nn.Module):
    """As those of RDNet."""

    def __init__(self, channels: int, dims: int = 2) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            timm.layers.LayerNorm2d(channels),
            nn.Conv2d(channels, 12, 1),
            nn.GELU(),
            nn.Conv2d(12, K, 1),
            timm.layers.EffectiveSEModule(K),
        )
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, K))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.gamma.view(1, -1, 1, 1)


class ShuffleLayer(nn.Module):
    """As those of CondenseNet: chosen channels, grouped convolutions, a shuffle by ``view``."""

    def __init__(self, channels: int, dims: int = 2) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 1, groups=2, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, K, 3, padding=1, groups=2, bias=False)
        self.register_buffer("index", torch.arange(channels).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        x = F.relu(self.norm(torch.index_select(x, 1, self.index)))
        return self.conv2(F.relu(self.norm2(self.conv(x))))


LAYERS = {
    "squeeze and excite": Layer,
    "in place": InPlaceLayer,
    "drop path and dropout": DropPathLayer,
    "depthwise, LayerNorm2d": DepthwiseLayer,
    "shuffle": ShuffleLayer,
}


class Block(nn.Module):
    """Calls its layers in one of the ways that people write."""

    def __init__(self, layer=Layer, form: str = "tensor", layers: int = 3, dims: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make(layer, form)(C0 + K * at, dims) for at in range(layers))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        if self.form in ("joins", "joins in front"):
            for layer in self.layers:
                x = layer(x)
            return x
        features = [x]
        for layer in self.layers:
            if self.form == "in front":
                features.insert(0, layer(torch.cat(features, 1)))
            elif self.form == "list":
                features.append(layer(features))
            elif self.form == "tensors":
                features.append(layer(*features))
            else:
                features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


FORMS = ("tensor", "in front", "joins", "joins in front", "list", "tensors")


def make(layer: type[nn.Module], form: str) -> type[nn.Module]:
    """A class of layers with another signature."""

    class Joins(layer):
        def forward(self, x):
            return torch.cat([x, super().forward(x + 0)], 1)

    class JoinsInFront(layer):
        def forward(self, x):
            return torch.cat([super().forward(x + 0), x], 1)

    class List(layer):
        def forward(self, features):
            return super().forward(torch.cat(features, 1))

    class Tensors(layer):
        def forward(self, *features):
            return super().forward(torch.cat(features, 1))

    return {"joins": Joins, "joins in front": JoinsInFront, "list": List, "tensors": Tensors}.get(form, layer)

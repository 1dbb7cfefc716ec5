# SPDX-License-Identifier: Apache-2.0
"""Dense blocks as people write them: other names, other containers, the concatenation in the layer or in the block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C0, K, WIDTH = 6, 4, 8


class Layer(nn.Module):
    """bn1, conv1, bn2, conv2 and functional ReLU; ``join`` makes the result of input and new features."""

    def __init__(self, channels: int, bottleneck: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.bottleneck = bottleneck
        if bottleneck:
            self.conv1 = nn.Conv2d(channels, WIDTH, kernel_size=1, bias=False)
            self.bn2 = nn.BatchNorm2d(WIDTH)
        self.conv2 = nn.Conv2d(WIDTH if bottleneck else channels, K, kernel_size=3, padding=1, bias=False)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        if self.bottleneck:
            out = F.relu(self.bn2(self.conv1(out)))
        out = self.conv2(out)
        if self.drop > 0:
            out = F.dropout(out, p=self.drop, training=self.training)
        return self.join(x, out)

    def join(self, x: Tensor, new: Tensor) -> Tensor:
        return torch.cat([x, new], 1)


class NewestFirstLayer(Layer):
    def join(self, x: Tensor, new: Tensor) -> Tensor:
        return torch.cat([new, x], 1)


class NewLayer(Layer):
    """Returns the new features alone."""

    def join(self, x: Tensor, new: Tensor) -> Tensor:
        return new


class SequenceLayer(nn.Sequential):
    """Modules in a sequence, the concatenation in its forward."""

    def __init__(self, channels: int, bottleneck: bool = True, drop: float = 0.0) -> None:
        middle = [nn.Conv2d(channels, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()] if bottleneck else []
        last = nn.Conv2d(WIDTH if bottleneck else channels, K, 3, padding=1, bias=False)
        super().__init__(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), *middle, last, nn.Dropout(drop))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, super().forward(x)), dim=1)


class NestedLayer(nn.Module):
    """A sequence inside a module."""

    def __init__(self, channels: int, bottleneck: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        self.branch = nn.Sequential(*SequenceLayer(channels, bottleneck, drop).children())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.branch(x)), dim=1)


class ListLayer(NewLayer):
    """Reads a list of all earlier features."""

    def forward(self, features: list[Tensor]) -> Tensor:
        return super().forward(torch.cat(features, 1))


def widths(layers: int) -> list[int]:
    return [C0 + at * K for at in range(layers)]


def plain_sequence(layers: int, layer=Layer, **options) -> nn.Module:
    return nn.Sequential(*[layer(channels, **options) for channels in widths(layers)])


class Around(nn.Module):
    """A module that only calls a sequence of layers."""

    def __init__(self, layers: int, layer=Layer, **options) -> None:
        super().__init__()
        self.layer = plain_sequence(layers, layer, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Joining(nn.Module):
    """Concatenates what its list of layers makes."""

    def __init__(self, layers: int, layer=NewLayer, container=nn.ModuleList, **options) -> None:
        super().__init__()
        self.units = container(plain_sequence(layers, layer, **options).children())

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = torch.cat([x, unit(x)], 1)
        return x


class JoiningSequence(Joining):
    """A sequence that is no more than a list."""

    def __init__(self, layers: int, **options) -> None:
        super().__init__(layers, container=lambda units: nn.Sequential(*units), **options)


class JoiningInFront(Joining):
    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = torch.cat([unit(x), x], 1)
        return x


class Collecting(nn.Module):
    """Keeps all features in a list; the layers are its own children."""

    def __init__(self, layers: int, **options) -> None:
        super().__init__()
        for at, channels in enumerate(widths(layers)):
            self.add_module(f"unit{at}", ListLayer(channels, **options))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for unit in self.children():
            features.append(unit(features))
        return torch.cat(features, 1)


class Reduction(nn.Module):
    """A transition with other names."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, out, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class Net(nn.Module):
    """Two dense blocks of 2 and 3 layers."""

    def __init__(self, block, **options) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C0, kernel_size=3, padding=1, bias=False)
        self.dense1, self.trans1 = block(2, **options), Reduction(C0 + 2 * K, C0)
        self.dense2 = block(3, **options)
        self.bn = nn.BatchNorm2d(C0 + 3 * K)
        self.linear = nn.Linear(C0 + 3 * K, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense2(self.trans1(self.dense1(self.stem(x))))
        return self.linear(F.relu(self.bn(x)).mean((2, 3)))


LAYOUTS = {
    "sequence of layers": plain_sequence,
    "new features first": lambda layers, **options: plain_sequence(layers, NewestFirstLayer, **options),
    "sequences that join": lambda layers, **options: plain_sequence(layers, SequenceLayer, **options),
    "sequences in modules": lambda layers, **options: plain_sequence(layers, NestedLayer, **options),
    "a module around": Around,
    "a block that joins": Joining,
    "a block that joins a sequence": JoiningSequence,
    "a block that joins in front": JoiningInFront,
    "a list of features": Collecting,
}

# SPDX-License-Identifier: Apache-2.0
"""Trains an FC-DenseNet to label the pixels of synthetic pictures: background, square or disc.

python examples/segmentation.py --steps 50
"""

import argparse

import torch
from torch import Tensor, nn

from fastdense.models import FCDenseNet, fc_densenet56


def pictures(count: int, size: int) -> tuple[Tensor, Tensor]:
    """``[count, 3, size, size]`` in noise, and the classes of its pixels, ``[count, size, size]``."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    labels = torch.zeros(count, size, size, dtype=torch.long)
    for label in labels:
        for kind in (1, 2):
            centre_y, centre_x, radius = (torch.rand(3) * torch.tensor([size, size, size / 4])).tolist()
            dy, dx = (y - centre_y).abs(), (x - centre_x).abs()
            shape = torch.maximum(dy, dx) if kind == 1 else (dy**2 + dx**2).sqrt()
            label[shape <= radius + 2] = kind
    colours = torch.tensor([[0.1, 0.1, 0.1], [0.8, 0.3, 0.3], [0.3, 0.3, 0.8]])
    return colours[labels].movedim(-1, 1) + 0.1 * torch.randn(count, 3, size, size), labels


def train(steps: int, batch: int, size: int, small: bool) -> list[float]:
    """Returns the loss of each step."""
    net = FCDenseNet(4, (2, 2), 2, (2, 2), num_classes=3) if small else fc_densenet56(num_classes=3)
    optimizer = torch.optim.RMSprop(net.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        images, labels = pictures(batch, size)
        optimizer.zero_grad()
        out = net(images)
        loss = nn.functional.cross_entropy(out, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        right = (out.argmax(1) == labels).float().mean()
        print(f"step {step + 1}: loss {losses[-1]:.3f}, pixels right {right:.1%}")
    return losses


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--small", action="store_true", help="a net of a few layers, to try the script")
    return train(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()

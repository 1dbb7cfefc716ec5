# SPDX-License-Identifier: Apache-2.0
"""Trains MONAI's DenseNet on synthetic volumes: whether a bright ball in noise is a large one.

python examples/volumes.py --steps 50
"""

import argparse

import torch
from monai.networks.nets import DenseNet
from torch import Tensor, nn

import fastdense


def volumes(count: int, size: int) -> tuple[Tensor, Tensor]:
    """``[count, 1, size, size, size]`` and labels: balls of radius 0.2 or 0.35 of the cube."""
    labels = torch.arange(count) % 2
    axis = torch.linspace(-0.5, 0.5, size)
    centres = (torch.rand(count, 3, 1, 1, 1) - 0.5) * 0.2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    distance = (torch.stack([z, y, x]) - centres).square().sum(1).sqrt()
    inside = distance < (0.2 + 0.15 * labels).view(-1, 1, 1, 1)
    return (inside + 0.3 * torch.randn(inside.shape)).unsqueeze(1), labels


def train(steps: int, batch: int, size: int, layers: tuple[int, ...]) -> list[float]:
    """Returns the loss of each step."""
    net = DenseNet(3, 1, 2, init_features=16, growth_rate=8, block_config=layers)
    fastdense.convert(net, memory="min")
    print(fastdense.report(net, (1, size, size, size)))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        images, labels = volumes(batch, size)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.3f}")
    return losses


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--layers", type=int, nargs="+", default=(6, 12, 24, 16))
    return train(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Trains torchvision's DenseNet-121 on an image folder: DATA/class/picture.png.

python examples/image_folder.py DATA --epochs 10
"""

import argparse
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

import fastdense


def train(data: Path, epochs: int, batch: int, size: int, small: bool) -> list[float]:
    """Returns the mean loss of each epoch."""
    transform = transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    pictures = torchvision.datasets.ImageFolder(data, transform)
    loader = DataLoader(pictures, batch, shuffle=True)
    classes = len(pictures.classes)
    if small:
        net = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=classes)
    else:
        net = torchvision.models.densenet121(num_classes=classes)
    fastdense.convert(net)  # the one line
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
        schedule.step()
        losses.append(total / len(pictures))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")
    return losses


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--small", action="store_true", help="a net of a few layers, to try the script")
    return train(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()

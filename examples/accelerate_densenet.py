# SPDX-License-Identifier: Apache-2.0
"""Trains a converted timm DenseNet in a loop of Hugging Face's accelerate, on synthetic pictures.

python examples/accelerate_densenet.py --accumulate 2
"""

import argparse

import timm.models.densenet
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastdense


def blobs(count: int, size: int) -> TensorDataset:
    """Noise that is brighter in the left or in the right half, and in which."""
    labels = torch.arange(count) % 2
    left = (torch.arange(size) < size // 2).float()
    bright = torch.stack([left, 1 - left])[labels].view(count, 1, 1, size)
    return TensorDataset(bright + 0.5 * torch.randn(count, 3, size, size), labels)


def train(epochs: int, count: int, size: int, layers: tuple[int, ...], accumulate: int, precision: str) -> list[float]:
    """Returns the loss of each batch."""
    accelerator = Accelerator(gradient_accumulation_steps=accumulate, mixed_precision=precision)
    net = fastdense.convert(timm.models.densenet.DenseNet(8, tuple(layers), num_classes=2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    net, optimizer, loader = accelerator.prepare(net, optimizer, DataLoader(blobs(count, size), 8, shuffle=True))
    losses = []
    for _ in range(epochs):
        for images, labels in loader:
            with accelerator.accumulate(net):
                loss = nn.functional.cross_entropy(net(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    accelerator.print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
    return losses


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--count", type=int, default=256, help="of pictures")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--layers", type=int, nargs="+", default=(6, 12, 8))
    parser.add_argument("--accumulate", type=int, default=1, help="batches a step of the optimizer takes")
    parser.add_argument("--precision", default="no", choices=("no", "bf16", "fp16"))
    return train(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()

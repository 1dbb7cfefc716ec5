# SPDX-License-Identifier: Apache-2.0
"""Trains a converted DenseNet by Lightning, on synthetic pictures, in bfloat16 where asked for.

python examples/lightning_densenet.py --precision bf16-mixed
"""

import argparse

import lightning
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastdense


class Classifier(lightning.LightningModule):
    """A DenseNet and its training step."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__()
        net = torchvision.models.DenseNet(8, layers, 16, num_classes=2)
        self.net = fastdense.convert(net)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def stripes(count: int, size: int) -> TensorDataset:
    """Noise with vertical or horizontal stripes, and which of them."""
    labels = torch.arange(count) % 2
    wave = torch.linspace(0, 12, size).sin()
    patterns = torch.stack([wave.expand(size, size), wave.expand(size, size).t()])
    return TensorDataset(
        patterns[labels].unsqueeze(1).expand(-1, 3, -1, -1) + torch.randn(count, 3, size, size), labels
    )


def train(epochs: int, count: int, size: int, layers: tuple[int, ...], precision: str) -> list[float]:
    """Returns the loss of each step."""
    classifier = Classifier(tuple(layers))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        precision=precision,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, DataLoader(stripes(count, size), batch_size=8, shuffle=True))
    print(f"loss {classifier.losses[0]:.3f} at the start, {classifier.losses[-1]:.3f} at the end")
    return classifier.losses


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--count", type=int, default=256, help="of pictures")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--layers", type=int, nargs="+", default=(6, 12, 8))
    parser.add_argument("--precision", default="32-true", help="of lightning.Trainer")
    return train(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()

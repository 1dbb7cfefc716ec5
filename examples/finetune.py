# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a pretrained DenseNet on a folder of pictures, keeps it, and names the classes of pictures.

python examples/finetune.py DATA --weights DEFAULT --out flowers
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import fastdense
from fastdense.train.prediction import load_classifier, predict

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def finetune(data: Path, weights: str, out: Path, epochs: int, batch: int, size: int, lr: float) -> list[float]:
    """Returns the mean loss of each epoch, and writes the model to the folder `out`."""
    steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    pictures = ImageFolder(data, transform)
    loader = DataLoader(pictures, batch, shuffle=True)
    # A new last layer for these classes; a warning says so.
    net = fastdense.models.densenet121(weights=weights, num_classes=len(pictures.classes))
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
        schedule.step()
        losses.append(total / len(pictures))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")
    about = {"classes": pictures.classes, "size": size, "mean": MEAN, "std": STD}
    fastdense.models.save_pretrained(net, out, data=about)
    return losses


def name_classes(out: Path, pictures: list[Path]) -> list[str]:
    """The likeliest class of each picture."""
    classifier = load_classifier("finetune", str(out))
    found = list(predict(classifier, pictures))
    for one in found:
        print(f"{one.path}: {one.classes[0]} ({one.probabilities[0]:.2f})")
    return [one.classes[0] for one in found]


def main(arguments: list[str] | None = None) -> tuple[list[float], list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with one sub-folder of pictures a class")
    parser.add_argument("--weights", default="DEFAULT", help="DEFAULT, timm/densenet121.ra_in1k, or a file")
    parser.add_argument("--out", type=Path, default=Path("finetuned"))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--predict", type=Path, nargs="*", default=[], help="pictures to classify in the end")
    given = vars(parser.parse_args(arguments))
    pictures = given.pop("predict")
    return finetune(**given), name_classes(given["out"], pictures)


if __name__ == "__main__":
    main()

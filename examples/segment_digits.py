# SPDX-License-Identifier: Apache-2.0
"""Trains an FC-DenseNet to say which digit every inked pixel belongs to, and tests it on digits it never saw.

Pictures are of scikit-learn's handwritten digits, three on each, at random places; a fifth of the digits are held out.

python examples/segment_digits.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from fastdense.models import FCDenseNet

BACKGROUND = 10
DIGITS_PER_PICTURE = 3


def pictures(
    digits: Tensor, classes: Tensor, count: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``[count, 1, size, size]`` in [0, 1] with noise, and the classes of the pixels, ``[count, size, size]``."""
    side = digits.shape[-1]
    images, labels = torch.zeros(count, size, size), torch.full((count, size, size), BACKGROUND)
    for image, label in zip(images, labels, strict=True):
        for index in torch.randint(len(digits), (DIGITS_PER_PICTURE,), generator=generator).tolist():
            top, left = torch.randint(size - side + 1, (2,), generator=generator).tolist()
            window = (slice(top, top + side), slice(left, left + side))
            inked = digits[index] > 0.3
            image[window] = torch.maximum(image[window], digits[index])
            label[window][inked] = classes[index]
    return (images + 0.05 * torch.randn(images.shape, generator=generator))[:, None], labels


@torch.no_grad()
def evaluate(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of right pixels: of all, and of those with ink."""
    net.eval()
    right = torch.cat([net(batch).argmax(1) for batch in images.split(16)]) == labels
    return right.float().mean().item(), right[labels != BACKGROUND].float().mean().item()


def train(steps: int, batch: int, size: int, growth_rate: int) -> list[float]:
    """Returns the loss of each step."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    data = load_digits()
    digits = torch.from_numpy(data.images).float()[:, None] / 16
    digits = nn.functional.interpolate(digits, scale_factor=2, mode="bilinear")[:, 0]
    classes = torch.from_numpy(data.target)
    held_out = torch.arange(len(digits)) % 5 == 4
    net = FCDenseNet(growth_rate, (3, 4), 5, (4, 3), in_channels=1, init_features=24, num_classes=11, drop_rate=0.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    losses = []
    for _ in (progress := tqdm(range(steps), desc="training")):
        images, labels = pictures(digits[~held_out], classes[~held_out], batch, size, generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    images, labels = pictures(digits[held_out], classes[held_out], 64, size, generator)
    everywhere, inked = evaluate(net, images, labels)
    print(f"digits never seen: {everywhere:.1%} of all pixels right, {inked:.1%} of those with ink")
    return losses


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="pictures of a step; default: %(default)s")
    parser.add_argument("--size", type=int, default=48, help="side of a picture, at least 16; default: %(default)s")
    parser.add_argument("--growth-rate", type=int, default=12, help="default: %(default)s")
    return train(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()

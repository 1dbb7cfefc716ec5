# SPDX-License-Identifier: Apache-2.0
"""A training script in the manner of timm's ``train.py``, on pictures of noise: run by its path, as a user's own."""

import argparse

import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV2, accuracy
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--num-classes", type=int, default=2)
    parser.add_argument("--grad-checkpointing", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = create_model(args.model, num_classes=args.num_classes, drop_rate=None)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    labels = torch.arange(8) % args.num_classes
    pictures = TensorDataset(torch.rand(8, 3, 32, 32) + labels.view(8, 1, 1, 1), labels)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01, layer_decay=0.9)
    schedule = CosineLRScheduler(optimizer, t_initial=1)
    averaged = ModelEmaV2(model, decay=0.5)
    loss_of = LabelSmoothingCrossEntropy(0.1)
    model.train()
    for images, targets in DataLoader(pictures, 4):
        loss = loss_of(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update(model)
        print(f"loss {loss.item():.6f}")
    schedule.step(1)
    with torch.no_grad():
        (top1,) = accuracy(averaged.module.eval()(pictures.tensors[0]), labels)
    print(f"accuracy {top1:.1f}, {type(model).__module__}.{type(model).__name__}")


if __name__ == "__main__":
    main()

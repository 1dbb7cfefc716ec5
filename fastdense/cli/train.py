# SPDX-License-Identifier: Apache-2.0
"""``fastdense train``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastdense._choices import AUGMENTATIONS, SCHEDULES, TRAIN_MEMORY
from fastdense._support import InputError
from fastdense.cli.arguments import (
    MOST_PROCESSES,
    Commands,
    add_command,
    add_machine,
    add_model,
    assignment,
    check_of_cifar,
    count,
)

HELP = """Train a model on pictures or digits.

Trains a model on a folder of pictures with one sub-folder a class, or on the 8 x 8 digits of scikit-learn. Writes
checkpoint.pt (atomic, also inside an epoch), metrics.json, log.csv and curves.png; a run that was killed continues
with --resume and ends with the same weights. Ctrl-C writes a checkpoint of the last step.

examples:
  fastdense train --data digits --epochs 10
  fastdense train --data pictures/ --model densenet121 --size 224 --batch 16 --out runs/pictures
  fastdense train --data pictures/ --model densenet121 --size 224 --weights densenet121.pth --lr 0.01 --warmup 1
  fastdense train --model resnet_cifar --set depth=20 --data digits --epochs 20
  fastdense train --data digits --out runs/digits --resume --epochs 20
  fastdense train --task sr --scale 2                     SRCNN on the photographs of scikit-image; writes model.pt
  fastdense train --task sr --model rrdbnet --set blocks=3 --data pictures/ --scale 4
"""


# Options that a task does not know.
_UNUSED = {
    "classify": ("scale", "steps"),
    "sr": (
        *("augment", "weights", "freeze", "epochs", "schedule", "warmup", "label_smoothing", "ema", "momentum"),
        *("weight_decay", "memory", "budget", "tensorboard", "workers", "depth", "growth_rate"),
    ),
}


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "train", HELP, run)
    add_model(parser, None, "densenet_cifar, or srcnn with sr", depth=40)
    parser.add_argument(
        "--task", choices=("classify", "sr"), default="classify", help="sr: super-resolution (default: %(default)s)"
    )
    parser.add_argument("--scale", type=int, default=2, metavar="S", help="of super-resolution (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help="of super-resolution (default: %(default)s)")
    parser.add_argument(
        "--set",
        type=assignment,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the model's function, e.g. --set depth=20; may be given again",
    )
    parser.add_argument("--data", metavar="digits|photographs|DIR", help="default: digits, or photographs with sr")
    parser.add_argument(
        "--size", type=int, help="side of an image in pixels (default: 16 for digits, else 32), with sr of a patch"
    )
    parser.add_argument(
        "--augment",
        choices=AUGMENTATIONS,
        help="crop: at random sizes, as for ImageNet; shift: as for CIFAR (default: shift for digits, else crop)",
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="begin with these; another last layer is left out")
    parser.add_argument("--freeze", action="store_true", help="train the last layer only")
    parser.add_argument("--epochs", type=int, help="a resumed run may be given more (default: the checkpoint's, or 10)")
    parser.add_argument("--batch", type=int, help="images per step (default: 64, or 16 with sr)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the checkpoint's; 0.1; 0.001 with sr)")
    parser.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="cosine",
        help="how the rate falls: to 0, or by 10 at 50 %% and 75 %% (default: cosine; not with sr)",
    )
    parser.add_argument("--warmup", type=float, default=0.0, metavar="EPOCHS", help="in which the rate rises to --lr")
    parser.add_argument("--label-smoothing", type=float, default=0.0, metavar="E", help="e.g. 0.1 (default: 0)")
    parser.add_argument("--ema", type=float, default=0.0, metavar="DECAY", help="test averaged weights, e.g. 0.999")
    parser.add_argument("--momentum", type=float, default=0.9, help="Nesterov momentum (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="default: %(default)s")
    parser.add_argument("--memory", choices=TRAIN_MEMORY, default="balanced", help="default: balanced")
    parser.add_argument("--budget", metavar="SIZE", help="of tensor memory, like 8GiB: finds the modes that fit")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/train, or runs/sr with sr")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    again.add_argument("--fresh", action="store_true", help="start anew although --out holds a checkpoint")
    parser.add_argument(
        "--checkpoint-seconds", type=float, default=60.0, metavar="S", help="between checkpoints (default: 60)"
    )
    parser.add_argument("--tensorboard", action="store_true", help="log for TensorBoard, too, in --out")
    parser.add_argument(
        "--workers", type=count(MOST_PROCESSES), metavar="N", help="processes that read pictures (default: up to 4)"
    )
    add_machine(parser)
    parser.set_defaults(
        unused={task: {name: parser.get_default(name) for name in names} for task, names in _UNUSED.items()}
    )


def run(options: argparse.Namespace) -> int:
    """Trains and prints the final accuracy, or how much better than bicubic enlargement the network is."""
    for name, default in options.unused[options.task].items():
        if getattr(options, name) != default:
            raise InputError(f"train: expected no --{name.replace('_', '-')} with --task {options.task}")
    return _super_resolution(options) if options.task == "sr" else _classify(options)


def _classify(options: argparse.Namespace) -> int:
    from fastdense import models
    from fastdense.train import TrainConfig, train
    from fastdense.train.data import DIGITS

    options.model = options.model or "densenet_cifar"
    if options.model not in models.list():
        known = ", ".join(models.list())
        raise InputError(f"train: expected --model to be one of {known}, got {options.model!r}")
    check_of_cifar("train", options, "; --set depth=20 is for other models")
    config = TrainConfig(
        model=options.model,
        model_kwargs=model_kwargs(options),
        data=options.data or DIGITS,
        size=options.size,
        augment=options.augment,
        weights=options.weights,
        freeze=options.freeze,
        epochs=options.epochs,
        batch=64 if options.batch is None else options.batch,
        lr=options.lr,
        schedule=options.schedule,
        warmup=options.warmup,
        label_smoothing=options.label_smoothing,
        ema=options.ema,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        memory=options.memory,
        budget=options.budget,
        device=options.device,
        dtype=options.dtype,
        seed=options.seed,
        threads=options.threads,
        workers=options.workers,
        tensorboard=options.tensorboard,
        out=options.out or Path("runs/train"),
        resume=options.resume,
        fresh=options.fresh,
        checkpoint_seconds=options.checkpoint_seconds,
    )
    result = train(config)
    if not result.paths:
        return 0  # another process of the run wrote them, and reports
    print(f"test accuracy {100 * result.test_accuracy:.2f} %")
    for path in result.paths:
        print(f"wrote {path}")
    return 0


def _super_resolution(options: argparse.Namespace) -> int:
    from fastdense.train.super_resolution import SuperResolutionConfig, train_super_resolution

    names = ("data", "batch", "lr", "out", "model")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.size is not None:
        given["patch"] = options.size
    config = SuperResolutionConfig(
        model_kwargs=dict(options.set),
        scale=options.scale,
        steps=options.steps,
        device=options.device,
        dtype=options.dtype,
        seed=options.seed,
        threads=options.threads,
        resume=options.resume,
        fresh=options.fresh,
        checkpoint_seconds=options.checkpoint_seconds,
        **given,
    )
    try:
        result = train_super_resolution(config)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(error)) from error
    for line in result.skipped:
        print(f"skipped {line}")
    gain = result.psnr - result.bicubic_psnr
    print(f"held-out pictures: {result.psnr:.3f} dB, bicubic {result.bicubic_psnr:.3f} dB, gain {gain:+.3f} dB")
    for path in result.paths:
        print(f"wrote {path}")
    return 0


def model_kwargs(options: argparse.Namespace) -> dict[str, Any]:
    """What the model's function takes beside the number of classes."""
    given = dict(options.set)
    if options.model == "densenet_cifar":
        return {"depth": options.depth, "growth_rate": options.growth_rate} | given
    return given

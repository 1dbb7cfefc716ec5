# SPDX-License-Identifier: Apache-2.0
"""``fastdense train``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastdense._support import InputError


def run(options: argparse.Namespace) -> int:
    """Trains and prints the final accuracy, or how much better than bicubic enlargement the network is."""
    return _super_resolution(options) if options.task == "sr" else _classify(options)


def _classify(options: argparse.Namespace) -> int:
    options.model = options.model or "densenet_cifar"
    import fastdense
    from fastdense.train import TrainConfig, train
    from fastdense.train.data import DIGITS

    if options.model not in fastdense.models.list():
        known = ", ".join(fastdense.models.list())
        raise InputError(f"train: expected --model to be one of {known}, got {options.model!r}")
    config = TrainConfig(
        model=options.model,
        model_kwargs=model_kwargs(options),
        data=options.data or DIGITS,
        size=options.size,
        epochs=options.epochs,
        batch=options.batch or 64,
        lr=options.lr,
        schedule=options.schedule,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        memory=options.memory,
        device=options.device,
        dtype=options.dtype,
        seed=options.seed,
        threads=options.threads,
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

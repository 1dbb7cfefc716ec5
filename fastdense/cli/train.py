# SPDX-License-Identifier: Apache-2.0
"""``fastdense train``."""

from __future__ import annotations

import argparse
from typing import Any

from fastdense._support import InputError


def run(options: argparse.Namespace) -> int:
    """Trains and prints the final accuracy."""
    import fastdense
    from fastdense.train import TrainConfig, train

    if options.model not in fastdense.models.list():
        known = ", ".join(fastdense.models.list())
        raise InputError(f"train: expected --model to be one of {known}, got {options.model!r}")
    config = TrainConfig(
        model=options.model,
        model_kwargs=model_kwargs(options),
        data=options.data,
        size=options.size,
        epochs=options.epochs,
        batch=options.batch,
        lr=options.lr,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        memory=options.memory,
        device=options.device,
        dtype=options.dtype,
        seed=options.seed,
        threads=options.threads,
        out=options.out,
        resume=options.resume,
        fresh=options.fresh,
        checkpoint_seconds=options.checkpoint_seconds,
    )
    result = train(config)
    print(f"test accuracy {100 * result.test_accuracy:.2f} %")
    for path in result.paths:
        print(f"wrote {path}")
    return 0


def model_kwargs(options: argparse.Namespace) -> dict[str, Any]:
    """What the model's function takes beside the number of classes."""
    given = dict(options.set)
    if options.model == "densenet_cifar":
        return {"depth": options.depth, "growth_rate": options.growth_rate} | given
    return given

# SPDX-License-Identifier: Apache-2.0
"""The network of a training run: made, given weights, frozen in part, averaged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdense import models
from fastdense._support import InputError
from fastdense.fusion.convert import restore
from fastdense.memory.plan import plan_memory
from fastdense.models.weights import last_layer, load_state, read_weights
from fastdense.train.config import TrainConfig
from fastdense.train.data import Dataset


def make_model(config: TrainConfig, data: Dataset, smallest: int) -> nn.Module:
    """The configured model with random weights, on the CPU.

    Args:
        config: what to make.
        data: whose images and classes it gets.
        smallest: images in the smallest batch.

    Raises:
        InputError: the model does not exist, or does not take these arguments or images of this size.
    """
    if config.model in models.list() and models.is_super_resolution(config.model):
        raise InputError(
            f"train: expected a model that classifies images, got {config.model}, which enlarges pictures: "
            f"fastdense train --task sr --model {config.model} trains it"
        )
    classes = len(data.classes)
    arguments = {"num_classes": classes, **config.model_kwargs}
    if arguments["num_classes"] != classes:
        raise InputError(
            f"train: expected num_classes to be {classes} as in the data, got {arguments['num_classes']!r}"
        )
    modes = models.memory_modes(config.model)
    if modes:
        arguments["memory"] = "balanced" if config.memory == "plain" else config.memory
    elif config.memory != "balanced":
        raise InputError(
            f"train: expected memory to be balanced for {config.model}, which has no dense blocks, "
            f"got {config.memory!r}"
        )
    try:
        model = models.create(config.model, **arguments)
    except (ValueError, TypeError) as error:
        raise InputError(f"train: cannot create {config.model!r}: {error}") from error
    try:
        with torch.no_grad():
            made = model.eval()(torch.zeros(1, 3, data.size, data.size))
            copy.deepcopy(model).train()(torch.zeros(min(smallest, 2), 3, data.size, data.size))
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"train: expected size and batch to be large enough for {config.model}, "
            f"got {data.size} and {smallest} images in the smallest batch: {reason}"
        ) from error
    if made.shape != (1, classes):
        raise InputError(f"train: expected a model that classifies images, got {config.model}")
    return restore(model) if config.memory == "plain" else model


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Loads a file of weights.

    Args:
        model: gets the weights; its last layer stays as it is where the file has one for other classes, or none.
        path: see :class:`fastdense.train.TrainConfig`. Nothing in it is executed.

    Returns:
        A line for each thing that was adapted.

    Raises:
        InputError: no such file, no weights in it, or those of another model; the message names the entry.
    """
    return load_state("train", model, read_weights("train", path), path)


def freeze(model: nn.Module) -> None:
    """Leaves the last layer as the only one that is trained."""
    model.requires_grad_(False)
    for layer in last_layer(model):
        model.get_submodule(layer).requires_grad_(True)


def set_training(model: nn.Module) -> None:
    """Training mode, but for modules that are frozen: their norms use running statistics, they drop nothing."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def fit_into(model: nn.Module, config: TrainConfig, size: int, batch: int) -> str:
    """Sets the memory modes of a model so that a step fits into the configured budget.

    Args:
        model: on its device.
        config: of the run.
        size: side of an image in pixels.
        batch: the most images of a step in this process.

    Returns:
        A line that says what a step needs.

    Raises:
        InputError: nothing fits, or the model has no blocks that are trained.
    """
    assert config.budget is not None
    set_training(model)
    how: dict[str, Any] = {"optimizer_state": float(config.momentum > 0)}
    if config.dtype != "float32":
        how["dtype"] = getattr(torch, config.dtype)
    try:
        plan = plan_memory(model, (3, size, size), batch_size=batch, budget=config.budget, **how)
    except ValueError as error:
        raise InputError(f"train: --budget {config.budget}: {error}") from error
    plan.apply()
    return str(plan).rpartition("\n")[2]


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Moves a moving average of weights and running statistics towards those after step `step`, counted from 1.

    In the first steps the decay is smaller, so that the average forgets the weights it began with.
    """
    decay = min(decay, step / (9 + step))
    for mean, value in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)

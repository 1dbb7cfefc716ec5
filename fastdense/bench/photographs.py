# SPDX-License-Identifier: Apache-2.0
"""Batches of real photographs: a folder of the user's, or those that ship with scikit-image."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastdense._support import InputError, MissingExtraError, extra
from fastdense.sr.images import IMAGENET_MEAN, IMAGENET_STD, CorruptImageError, find_images, open_rgb

# Files inside scikit-image's own data folder; read from there, so that nothing is downloaded.
SCIKIT_IMAGE_FILES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "ihc.png",
    "camera.png",
    "coins.png",
    "moon.png",
    "brick.png",
    "grass.png",
    "gravel.png",
)


@dataclasses.dataclass(frozen=True)
class PhotoBatch:
    """Normalised images and where they come from.

    Attributes:
        images: float32 [n, 3, size, size], ImageNet mean and standard deviation.
        source: a phrase for people, e.g. ``"14 photographs of scikit-image"``.
        skipped: one line for each corrupt file.
    """

    images: NDArray[np.float32]
    source: str
    skipped: list[str]


def load_batch(folder: Path | None, count: int, size: int, seed: int = 0) -> PhotoBatch:
    """Makes a batch of random crops of photographs.

    Args:
        folder: any folder of pictures, searched to its depth; None takes scikit-image's.
        count: images in the batch; pictures are used again when there are fewer.
        size: side of each image in pixels.
        seed: of the crops.

    Raises:
        InputError: no usable picture was found.
    """
    paths = _scikit_image_files() if folder is None else _folder_files(folder)
    pictures, skipped = _open_first(paths, count)
    if not pictures:
        raise InputError(
            f"bench: expected --images to hold at least one readable picture, got {len(skipped)}"
            f" corrupt ones in {folder}: " + "; ".join(skipped[:3])
        )
    rng = np.random.default_rng(seed)
    sources = itertools.islice(itertools.cycle(pictures), count)
    images = np.stack([_random_crop(picture, size, rng) for picture in sources])
    origin = "scikit-image" if folder is None else str(folder)
    return PhotoBatch(images, f"{len(pictures)} photographs of {origin}", skipped)


def scikit_image_folder(command: str, option: str = "--data") -> Path:
    """Where the installed scikit-image keeps its photographs."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            f"{command}: scikit-image, whose photographs are used by default, is not installed;"
            f" run: pip install 'fastdense[train]', or give your own with {option} DIR"
        )
    return Path(spec.origin).parent / "data"


def _scikit_image_files() -> list[Path]:
    """The photographs of the installed scikit-image that are really on disk."""
    folder = scikit_image_folder("bench", "--images")
    paths = [folder / name for name in SCIKIT_IMAGE_FILES if (folder / name).is_file()]
    if not paths:
        raise InputError("bench: this installation of scikit-image has no photographs; give your own with --images DIR")
    return paths


def _folder_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"bench: expected --images to be a folder of pictures, got {folder}")
    paths = find_images(folder)
    if not paths:
        raise InputError(f"bench: expected --images to hold pictures, got none in {folder}")
    return paths


def _open_first(paths: Iterable[Path], count: int) -> tuple[list[NDArray[np.uint8]], list[str]]:
    """Decodes pictures until there are `count`; returns them and a line per corrupt file."""
    pictures: list[NDArray[np.uint8]] = []
    skipped: list[str] = []
    for path in paths:
        if len(pictures) == count:
            break
        try:
            pictures.append(np.asarray(open_rgb(path)))
        except CorruptImageError as error:
            skipped.append(str(error))
    return pictures, skipped


def _random_crop(picture: NDArray[np.uint8], size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Cuts a random square of half to all of the shorter side, resized and normalised, [3, H, W].

    picture: [height, width, 3].
    """
    with extra("cli"):
        from PIL import Image
    height, width, _ = picture.shape
    side = max(1, round(min(height, width) * rng.uniform(0.5, 1.0)))
    top = int(rng.integers(height - side + 1))
    left = int(rng.integers(width - side + 1))
    square = Image.fromarray(picture[top : top + side, left : left + side])
    pixels = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
    normalised = (pixels - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1), dtype=np.float32)

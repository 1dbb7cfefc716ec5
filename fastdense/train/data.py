# SPDX-License-Identifier: Apache-2.0
"""Training data held in memory: scikit-learn's digits, or a folder of pictures.

The order and the augmentation of an epoch are a pure function of seed and epoch, so that a run that was stopped goes on
with the same batches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fastdense._support import InputError, extra
from fastdense.sr.images import IMAGENET_MEAN, IMAGENET_STD, CorruptImageError, find_images, open_rgb

DIGITS = "digits"
DIGITS_SIZE = 16
FOLDER_SIZE = 32

# The split into training and test images stays the same for every seed of the training.
_SPLIT_SEED = 0
_TEST_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and their classes.

    Attributes:
        images: [n, 3, size, size], uint8 or float32 in [0, 1].
        labels: int64 [n].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Everything a training run reads.

    Attributes:
        train: images to learn from.
        test: images to measure the accuracy on.
        classes: names, in the order of the labels.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        flips: whether a mirrored image keeps its class.
        skipped: one line for each corrupt file.
    """

    train: Split
    test: Split
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flips: bool
    skipped: list[str] = dataclasses.field(default_factory=list)

    @property
    def size(self) -> int:
        """Side of an image in pixels."""
        return self.train.images.shape[-1]

    def fingerprint(self) -> str:
        """A line that differs when the images, their classes or the split differ."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for split in (self.train, self.test):
            digest.update(split.labels.numpy().tobytes())
            digest.update(split.images.numpy().data)
        return (
            f"{len(self.train)} + {len(self.test)} images of {len(self.classes)} classes, size {self.size},"
            f" sha256 {digest.hexdigest()[:16]}"
        )

    def normalise(self, images: Tensor) -> Tensor:
        """Scales pixels in [0, 1] to mean 0 and standard deviation 1 per channel."""
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        return (images - mean) / std


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """What happens to each training image in one epoch.

    Attributes:
        order: the image at each position.
        shifts: int64 [n, 2], rows and columns to move the content by, per position.
        flips: bool [n], whether to mirror, per position.
    """

    order: Tensor
    shifts: Tensor
    flips: Tensor


def plan_epoch(data: Dataset, seed: int, epoch: int) -> EpochPlan:
    """Draws order and augmentation of an epoch; the same arguments give the same plan."""
    random = np.random.default_rng([seed, epoch])
    count, most = len(data.train), data.size // 8
    order = random.permutation(count)
    shifts = random.integers(-most, most + 1, (count, 2))
    flips = random.random(count) < 0.5 if data.flips else np.zeros(count, bool)
    return EpochPlan(torch.from_numpy(order), torch.from_numpy(shifts), torch.from_numpy(flips))


def pixels(images: Tensor) -> Tensor:
    """Stored images as float32 in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def augment(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Moves and mirrors images; what enters at the border is zero.

    Args:
        images: [n, channels, size, size].
        shifts: int64 [n, 2], rows and columns.
        flips: bool [n].
    """
    size = images.shape[-1]
    margin = int(shifts.abs().max()) if len(shifts) else 0
    padded = functional.pad(images, (margin,) * 4)
    along = torch.arange(size)
    rows = along + margin - shifts[:, :1]
    columns = along + margin - shifts[:, 1:]
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    which = torch.arange(len(images))[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def load(source: str, size: int | None = None) -> Dataset:
    """Reads the digits or a folder.

    Args:
        source: ``"digits"``, or a folder with one sub-folder a class, or with ``train`` and ``val`` that hold those.
        size: side of an image in pixels; None takes 16 for digits and 32 for a folder.

    Raises:
        InputError: the folder does not hold at least two classes with readable pictures.
    """
    if source == DIGITS:
        return load_digits(size or DIGITS_SIZE)
    return load_folder(Path(source), size or FOLDER_SIZE)


def load_digits(size: int = DIGITS_SIZE) -> Dataset:
    """The 1797 handwritten digits of scikit-learn, 8 x 8 pixels resized to `size`, as grey RGB images."""
    with extra("train"):
        from sklearn import datasets
    digits = datasets.load_digits()
    small = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
    grey = functional.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    images = grey.expand(-1, 3, -1, -1).contiguous()
    labels = digits.target.astype(np.int64)
    train, test = _split(images, labels)
    mean, std = float(train.images.mean()), float(train.images.std())
    return Dataset(train, test, [str(name) for name in digits.target_names], (mean,) * 3, (std,) * 3, flips=False)


def load_folder(folder: Path, size: int = FOLDER_SIZE) -> Dataset:
    """Pictures in one sub-folder a class; a fifth of each class is for testing.

    Sub-folders ``train`` and ``val`` with the same classes replace that split. Pictures are resized by their shorter
    side and cropped to the centre; corrupt ones are named on standard error and left out.
    """
    if not folder.is_dir():
        raise InputError(f"train: expected data to be 'digits' or a folder, got {folder}")
    skipped: list[str] = []
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        classes = _class_names(folder / "train")
        found = _class_names(folder / "val")
        if found != classes:
            only = ", ".join(sorted(set(classes) ^ set(found)))
            raise InputError(
                f"train: expected train and val in {folder} to hold the same classes, got only in one: {only}"
            )
        train, test = (
            Split(torch.from_numpy(images), torch.from_numpy(labels))
            for images, labels in (_read(folder / part, classes, size, skipped) for part in ("train", "val"))
        )
    else:
        classes = _class_names(folder)
        images, labels = _read(folder, classes, size, skipped)
        train, test = _split(torch.from_numpy(images), labels)
    if not len(test):
        raise InputError(f"train: expected at least one class with two pictures or more in {folder}, got one each")
    return Dataset(train, test, classes, IMAGENET_MEAN, IMAGENET_STD, flips=True, skipped=skipped)


def _class_names(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        raise InputError(
            f"train: expected {folder} to hold a sub-folder for each of at least 2 classes, got {len(names)}"
        )
    return names


def _read(
    folder: Path, classes: list[str], size: int, skipped: list[str]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Decodes the pictures of all classes; a line for each corrupt one goes to `skipped`."""
    files = [(path, label) for label, name in enumerate(classes) for path in _class_files(folder / name)]
    images = np.empty((len(files), 3, size, size), np.uint8)
    labels = np.empty(len(files), np.int64)
    kept = 0
    for path, label in files:
        try:
            images[kept] = _centre(path, size)
        except CorruptImageError as error:
            skipped.append(str(error))
            print(f"fastdense: skipped a corrupt picture: {error}", file=sys.stderr)
            continue
        labels[kept] = label
        kept += 1
    for label, name in enumerate(classes):
        if label not in labels[:kept]:
            raise InputError(f"train: expected class folder {folder / name} to hold a readable picture, got none")
    return images[:kept], labels[:kept]


def _class_files(folder: Path) -> list[Path]:
    files = find_images(folder)
    if not files:
        raise InputError(f"train: expected class folder {folder} to hold pictures, got none")
    return files


def _centre(path: Path, size: int) -> NDArray[np.uint8]:
    """The middle square of a picture, [3, size, size]."""
    picture = open_rgb(path)
    with extra("cli"):
        from PIL import Image, ImageOps
    square = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(square, np.uint8).transpose(2, 0, 1)


def _split(images: Tensor, labels: NDArray[np.int64]) -> tuple[Split, Split]:
    """Puts a fifth of each class aside, at least one image where there are two."""
    random = np.random.default_rng(_SPLIT_SEED)
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        count = max(1, round(_TEST_SHARE * len(members))) if len(members) > 1 else 0
        is_test[members[:count]] = True
    train, test = (
        Split(images[torch.from_numpy(chosen)].contiguous(), torch.from_numpy(labels[chosen]))
        for chosen in (~is_test, is_test)
    )
    return train, test

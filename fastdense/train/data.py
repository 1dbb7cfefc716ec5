# SPDX-License-Identifier: Apache-2.0
"""Training data: scikit-learn's digits in memory, or a folder of pictures of which only the names are."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fastdense._support import InputError, extra
from fastdense.sr.images import IMAGENET_MEAN, IMAGENET_STD, SUFFIXES, open_rgb

if TYPE_CHECKING:
    from PIL import Image

DIGITS = "digits"
DIGITS_SIZE = 16
FOLDER_SIZE = 32

# The split into training and test images stays the same for every seed of the training.
_SPLIT_SEED = 0
_TEST_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class Images:
    """Images in memory, and their classes.

    Attributes:
        images: [n, 3, size, size], float32 in [0, 1].
        labels: int64 [n].
    """

    images: Tensor
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """Image [3, size, size]."""
        return self.images[index]

    def part(self, chosen: NDArray[np.int64]) -> Images:
        """The images with these numbers."""
        return Images(self.images[torch.from_numpy(chosen)], self.labels[chosen])

    def digest(self) -> str:
        """Other images or classes, another digest."""
        digest = hashlib.sha256(self.labels.tobytes())
        digest.update(self.images.numpy().data)
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Files:
    """Picture files and their classes, in arrays: forked workers share those, and would copy a list of names.

    Attributes:
        folder: that the names are relative to.
        names: all of them, one behind the other.
        ends: int64, where each name ends.
        sizes: int64, bytes of each file.
        chosen: int64 [n], the numbers of the files that belong to this part.
        labels: int64 [n].
    """

    folder: str
    names: bytes
    ends: NDArray[np.int64]
    sizes: NDArray[np.int64]
    chosen: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.chosen)

    def path(self, index: int) -> Path:
        """Of a file."""
        at = int(self.chosen[index])
        start = int(self.ends[at - 1]) if at else 0
        return Path(self.folder, os.fsdecode(self.names[start : int(self.ends[at])]))

    def read(self, index: int) -> Image.Image:
        """The picture, RGB; raises what :func:`fastdense.sr.images.open_rgb` does."""
        return open_rgb(self.path(index))

    def part(self, chosen: NDArray[np.int64]) -> Files:
        """The files with these numbers."""
        return dataclasses.replace(self, chosen=self.chosen[chosen], labels=self.labels[chosen])

    def digest(self) -> str:
        """Other names, sizes or classes, another digest."""
        arrays = (self.ends, self.sizes, self.chosen, self.labels)
        digest = hashlib.sha256(self.names)
        for array in arrays:
            digest.update(array.tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Everything a training run reads.

    Attributes:
        train: images to learn from.
        test: images to measure the accuracy on.
        classes: names, in the order of the labels.
        size: side of an image in pixels.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        flips: whether a mirrored image keeps its class.
    """

    train: Images | Files
    test: Images | Files
    classes: list[str]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flips: bool

    def fingerprint(self) -> str:
        """A line that differs when the images, their classes or the split differ."""
        parts = [self.train.digest(), self.test.digest(), *self.classes]
        return (
            f"{len(self.train)} + {len(self.test)} images of {len(self.classes)} classes, size {self.size},"
            f" sha256 {hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"
        )

    def describe(self) -> dict[str, Any]:
        """What whoever uses the trained network needs: names of the classes, size, mean and standard deviation."""
        return {"classes": self.classes, "size": self.size, "mean": list(self.mean), "std": list(self.std)}

    def normalise(self, images: Tensor) -> Tensor:
        """Scales uint8, or floating point in [0, 1], to mean 0 and standard deviation 1 per channel, float32."""
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        return ((images.float() / 255 if images.dtype == torch.uint8 else images) - mean) / std


def load(source: str, size: int | None = None) -> Dataset:
    """Finds the digits or the pictures of a folder.

    Args:
        source: ``"digits"``, or a folder with one sub-folder a class, or with ``train`` and ``val`` that hold those.
        size: side of an image in pixels; None takes 16 for digits and 32 for a folder.

    Raises:
        InputError: the folder does not hold at least two classes with pictures.
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
    images = Images(grey.expand(-1, 3, -1, -1).contiguous(), digits.target.astype(np.int64))
    is_test = _test_share(images.labels)
    train, test = (images.part(np.flatnonzero(chosen)) for chosen in (~is_test, is_test))
    mean, std = float(train.images.mean()), float(train.images.std())
    names = [str(name) for name in digits.target_names]
    return Dataset(train, test, names, size, (mean,) * 3, (std,) * 3, flips=False)


def load_folder(folder: Path, size: int = FOLDER_SIZE) -> Dataset:
    """Pictures in one sub-folder a class; a fifth of each class is for testing.

    Sub-folders ``train`` and ``val`` with the same classes replace that split. No picture is opened here.
    """
    if not folder.is_dir():
        raise InputError(f"train: expected data to be 'digits' or a folder, got {folder}")
    train: Files
    test: Files
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        classes = _class_names(folder / "train")
        found = _class_names(folder / "val")
        if found != classes:
            only = ", ".join(sorted(set(classes) ^ set(found)))
            raise InputError(
                f"train: expected train and val in {folder} to hold the same classes, got only in one: {only}"
            )
        train, test = (_find_files(folder / part, classes) for part in ("train", "val"))
    else:
        classes = _class_names(folder)
        files = _find_files(folder, classes)
        is_test = _test_share(files.labels)
        train, test = (files.part(np.flatnonzero(chosen)) for chosen in (~is_test, is_test))
    if not len(test):
        raise InputError(f"train: expected at least one class with two pictures or more in {folder}, got one each")
    return Dataset(train, test, classes, size, IMAGENET_MEAN, IMAGENET_STD, flips=True)


def _class_names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"train: expected {folder} to be readable, got {error}") from error
    if len(names) < 2:
        raise InputError(
            f"train: expected {folder} to hold a sub-folder for each of at least 2 classes, got {len(names)}"
        )
    return names


def _find_files(folder: Path, classes: list[str]) -> Files:
    """The pictures of all classes, sorted within each folder."""
    names = bytearray()
    ends, sizes, labels = ([np.empty(0, np.int64)] for _ in range(3))
    for label, name in enumerate(classes):
        found = list(_class_files(folder, name))
        if not found:
            raise InputError(f"train: expected class folder {folder / name} to hold pictures, got none")
        lengths = np.array([len(path) for path, _ in found], np.int64)
        ends.append(len(names) + np.cumsum(lengths))
        sizes.append(np.array([size for _, size in found], np.int64))
        labels.append(np.full(len(found), label, np.int64))
        names += b"".join(path for path, _ in found)
    count = sum(len(part) for part in labels)
    return Files(
        str(folder), bytes(names), np.concatenate(ends), np.concatenate(sizes), np.arange(count), np.concatenate(labels)
    )


def _class_files(folder: Path, name: str) -> Iterator[tuple[bytes, int]]:
    """Names relative to `folder` and sizes of the pictures of a class, also in sub-folders; no hidden ones."""

    def refuse(error: OSError) -> None:
        raise InputError(f"train: expected class folder {folder / name} to be readable, got {error}") from error

    root = os.path.join(folder, "")
    for place, subfolders, files in os.walk(root + name, onerror=refuse):
        subfolders[:] = sorted(other for other in subfolders if not other.startswith("."))
        for file in sorted(files):
            if os.path.splitext(file)[1].lower() not in SUFFIXES or file.startswith("."):
                continue
            path = os.path.join(place, file)
            try:
                status = os.stat(path)
            except FileNotFoundError:  # a link that leads nowhere
                continue
            if stat.S_ISREG(status.st_mode):
                yield os.fsencode(path[len(root) :]), status.st_size


def _test_share(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which images are for testing: a fifth of each class, at least one where there are two."""
    random = np.random.default_rng(_SPLIT_SEED)
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        count = max(1, round(_TEST_SHARE * len(members))) if len(members) > 1 else 0
        is_test[members[:count]] = True
    return is_test

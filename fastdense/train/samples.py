# SPDX-License-Identifier: Apache-2.0
"""Batches of images, read and augmented by workers.

What happens to an image is a function of seed, epoch and its number, and the order of an epoch one of seed and epoch.
So a run that was stopped goes on with the same batches, whatever the number of workers.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from fastdense._support import InputError, extra
from fastdense.sr.images import CorruptImageError
from fastdense.train.data import Dataset
from fastdense.train.processes import Processes

# Of a picture or an image to [3, size, size].
Transform = Callable[[Any], Tensor]

# Unreadable pictures in a row that end a run.
_MOST_CORRUPT = 100
# Of the resized picture that is cropped for testing, as usual for ImageNet: 224 of 256 pixels.
TEST_CROP = 0.875


class Part(NamedTuple):
    """Images of one batch, for one process: of the training images in an epoch, or of the test images (None)."""

    epoch: int | None
    indices: NDArray[np.int64]


class Batch(NamedTuple):
    """What a worker makes of a :class:`Part`.

    Attributes:
        images: [n, 3, size, size], uint8, or float32 in [0, 1].
        labels: int64 [n].
        corrupt: a line for each file that could not be read; a training image is then replaced by the next one that
            can, a test image left out.
    """

    images: Tensor
    labels: Tensor
    corrupt: list[str]


class Samples(torch.utils.data.Dataset):
    """Reads and augments images; ``samples[part]`` is a batch.

    Args:
        data: what to read.
        augment: ``"crop"``, ``"shift"`` or ``"none"``, see :class:`fastdense.train.TrainConfig`.
        seed: of the augmentation.

    Raises:
        MissingExtraError: ``"crop"`` needs torchvision.
    """

    def __init__(self, data: Dataset, augment: str, seed: int) -> None:
        self.data, self.seed = data, seed
        middle = _Middle(data.size)
        self.train: Transform = middle
        self.test: Transform = middle
        if augment == "shift":
            self.train = _Shifted(data.size, data.flips)
        elif augment == "crop":
            self.train, self.test = _crops(data)

    def __getitem__(self, part: Part) -> Batch:
        split, tries = (self.data.test, 1) if part.epoch is None else (self.data.train, _MOST_CORRUPT)
        images: list[Tensor] = []
        labels: list[int] = []
        corrupt: list[str] = []
        with torch.random.fork_rng(devices=[]):
            for index in part.indices.tolist():
                for at in range(index, index + tries):
                    try:
                        picture = split.read(at % len(split))
                    except CorruptImageError as error:
                        corrupt.append(str(error))
                        continue
                    images.append(self._transformed(picture, part.epoch, index))
                    labels.append(int(split.labels[at % len(split)]))
                    break
        stacked = torch.stack(images) if images else torch.empty(0)
        return Batch(stacked, torch.tensor(labels, dtype=torch.int64), corrupt)

    def _transformed(self, picture: Any, epoch: int | None, index: int) -> Tensor:
        if epoch is None:
            return self.test(picture)
        seed = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1, np.uint64)
        torch.default_generator.manual_seed(int(seed[0]))
        return self.train(picture)


class Batches:
    """The batches of a run, on their way from the workers.

    Args:
        samples: what to read.
        size: images per batch, at most, of all processes together; an epoch is cut into steps of equal size.
        workers: processes that read ahead; with 0 this one reads.
        processes: with whom batches are shared.

    Attributes:
        steps: of an epoch.
        corrupt: a line for each file that could not be read so far.
    """

    def __init__(self, samples: Samples, size: int, workers: int, processes: Processes) -> None:
        self.samples, self.size, self.processes = samples, size, processes
        self.steps = math.ceil(len(samples.data.train) / size)
        self.corrupt: set[str] = set()
        self._parts = _Parts()
        self._loader = DataLoader(
            samples,
            batch_size=None,
            sampler=self._parts,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_begin_worker,
            persistent_workers=workers > 0,
            pin_memory=processes.device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the one of dropout
        )

    def bounds(self, step: int) -> slice:
        """The images of a training step of all processes, by position in the epoch."""
        count = len(self.samples.data.train)
        return slice(count * step // self.steps, count * (step + 1) // self.steps)

    def train(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's images and labels of the steps of an epoch, from step `first` on.

        Raises:
            InputError: none of many files could be read.
        """
        order = np.random.default_rng([self.samples.seed, epoch]).permutation(len(self.samples.data.train))
        shares = [self.processes.share(self.bounds(step)) for step in range(first, self.steps)]
        parts = [Part(epoch, order[share]) for share in shares]
        for part, batch in zip(parts, self._read(parts), strict=True):
            if len(batch.labels) < len(part.indices):
                raise InputError(
                    f"train: expected pictures that can be read, got {_MOST_CORRUPT} in a row that cannot, as"
                    f" {batch.corrupt[-1]}"
                )
            yield batch.images, batch.labels

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's test images and labels; none in some batches, perhaps."""
        count = len(self.samples.data.test)
        bounds = (slice(first, min(first + self.size, count)) for first in range(0, count, self.size))
        shares = [np.arange(count)[self.processes.share(where)] for where in bounds]
        for batch in self._read([Part(None, share) for share in shares]):
            yield batch.images, batch.labels

    def _read(self, parts: list[Part]) -> Iterator[Batch]:
        self._parts.next = parts
        batches = iter(self._loader)
        for _ in parts:
            try:
                batch = next(batches)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                if not reason.startswith("DataLoader worker"):
                    raise
                raise InputError(
                    f"train: expected the workers that read pictures to live, got: {reason}; where memory ran out, try"
                    " fewer --workers or a smaller --batch"
                ) from error
            for line in sorted(set(batch.corrupt) - self.corrupt):
                print(f"fastdense: skipped a corrupt picture: {line}", file=sys.stderr)
            self.corrupt.update(batch.corrupt)
            yield batch


class _Parts:
    """What the loader gives to its workers."""

    def __init__(self) -> None:
        self.next: list[Part] = []

    def __iter__(self) -> Iterator[Part]:
        return iter(self.next)


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_worker(worker: int) -> None:
    # Ctrl-C reaches all processes of a terminal; the main one ends its step, for which it needs the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # a collection would write to all objects that are shared with the main process, and so copy them


def read_ahead(data: torch.utils.data.Dataset[Any], batch: int, workers: int) -> Iterator[list[Any]]:
    """Lists of `batch` samples in their order, on their way from workers."""
    options: dict[str, Any] = {"worker_init_fn": _begin_worker, "generator": torch.Generator()}
    yield from DataLoader(data, batch, num_workers=workers, collate_fn=_as_it_is, **options)


def default_workers() -> int:
    """As many as there are CPUs for this process, up to four."""
    return min(4, len(os.sched_getaffinity(0)))


@dataclasses.dataclass(frozen=True)
class _Middle:
    """The largest square in the middle, resized; an image in memory is of that size already."""

    size: int

    def __call__(self, picture: Any) -> Tensor:
        if isinstance(picture, Tensor):
            return picture
        with extra("cli"):
            from PIL import Image, ImageOps
        return _as_tensor(ImageOps.fit(picture, (self.size, self.size), Image.Resampling.BILINEAR))


@dataclasses.dataclass(frozen=True)
class _Shifted:
    """The middle, moved by up to an eighth in each direction and mirrored; what enters is black. Usual for CIFAR."""

    size: int
    flips: bool

    def __call__(self, picture: Any) -> Tensor:
        most = self.size // 8
        padded = functional.pad(_Middle(self.size)(picture), (most,) * 4)
        top, left = torch.randint(2 * most + 1, (2,)).tolist()
        image = padded[:, top : top + self.size, left : left + self.size]
        return image.flip(2) if self.flips and torch.rand(()) < 0.5 else image


def _crops(data: Dataset) -> tuple[Transform, Transform]:
    """Crops of random size and aspect, mirrored, and the middle for testing. Usual for ImageNet."""
    with extra("train"):
        from torchvision.transforms import v2
    flips = [v2.RandomHorizontalFlip()] if data.flips else []
    train = v2.Compose([v2.RandomResizedCrop(data.size, antialias=True), *flips, _as_tensor])
    return train, centre_crop(data.size, round(data.size / TEST_CROP))


def centre_crop(size: int, resized: int, interpolation: str = "bilinear") -> Transform:
    """The middle square of side `size` of a picture whose shorter side is resized to `resized`."""
    with extra("train"):
        from torchvision.transforms import v2
    mode = v2.InterpolationMode(interpolation)
    return v2.Compose([v2.Resize(resized, interpolation=mode, antialias=True), v2.CenterCrop(size), _as_tensor])


def middle_square(size: int) -> Transform:
    """The largest square in the middle, resized; for pictures, and images in memory that are of that size already."""
    return _Middle(size)


def _as_tensor(picture: Any) -> Tensor:
    """[3, H, W] of a picture; a tensor stays one."""
    if isinstance(picture, Tensor):
        return picture
    return torch.from_numpy(np.array(picture, np.uint8)).permute(2, 0, 1)

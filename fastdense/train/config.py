# SPDX-License-Identifier: Apache-2.0
"""What a training run can be told, and what of it a resumed run must share."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from fastdense._choices import DTYPES, SCHEDULES, TRAIN_MEMORY
from fastdense._support import InputError
from fastdense.train.data import DIGITS, Dataset

# What may change between the parts of a resumed run: where it runs and how it writes. Bits are kept only as far as
# the machine gives the same sums, so with the same number of threads.
_FREE_FIELDS = frozenset(
    ("data", "size", "memory", "device", "threads", "out", "resume", "fresh", "checkpoint_seconds")
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how.

    Attributes:
        model: a name of :func:`fastdense.models.list`.
        model_kwargs: arguments of that model's function; the number of classes follows the data.
        data: ``"digits"``, or a folder with one sub-folder of pictures a class.
        size: side of an image in pixels; None takes 16 for digits and 32 for a folder.
        epochs: passes over the training images.
        batch: images per step, at most, of all processes together; an epoch is cut into steps of equal size.
        lr: learning rate of the first step.
        schedule: ``"cosine"``, along which the rate falls to 0, or ``"steps"``, a tenth of it at 50 % and at 75 %.
        weight_decay: L2 penalty of all parameters.
        momentum: Nesterov momentum in [0, 1).
        memory: ``"balanced"``, ``"min"``, or ``"plain"`` for the same model in plain PyTorch; a model without dense
            blocks takes ``"balanced"`` only.
        device: a torch device, e.g. ``"cpu"`` or ``"cuda"``.
        dtype: ``"float32"``, or ``"bfloat16"`` or ``"float16"`` for autocast.
        seed: of weights, order and augmentation.
        threads: CPU threads; 0 leaves the choice to torch.
        out: the folder of ``checkpoint.pt``, ``metrics.json`` and ``curves.png``.
        resume: whether to continue from the checkpoint in ``out``; without one the run starts from the beginning.
        fresh: whether to start from the beginning although there is a checkpoint, which is deleted.
        checkpoint_seconds: time between checkpoints inside an epoch; 0 writes one after each step.
    """

    model: str = "densenet_cifar"
    model_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: str = DIGITS
    size: int | None = None
    epochs: int = 10
    batch: int = 64
    lr: float = 0.1
    schedule: str = "cosine"
    weight_decay: float = 1e-4
    momentum: float = 0.9
    memory: str = "balanced"
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    threads: int = 0
    out: Path = Path("runs/train")
    resume: bool = False
    fresh: bool = False
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Refuses values that cannot be trained with.

        Raises:
            InputError: a value is out of its range.
        """
        checks = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch": (self.batch >= 1, "at least 1"),
            "size": (self.size is None or self.size >= 1, "at least 1"),
            "lr": (self.lr > 0 and math.isfinite(self.lr), "a positive number"),
            "schedule": (self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            "weight_decay": (self.weight_decay >= 0 and math.isfinite(self.weight_decay), "0 or more"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "memory": (self.memory in TRAIN_MEMORY, f"one of {', '.join(TRAIN_MEMORY)}"),
            "dtype": (self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            "seed": (0 <= self.seed < 2**63, "in [0, 2**63)"),
            "threads": (self.threads >= 0, "0 or more"),
            "checkpoint_seconds": (self.checkpoint_seconds >= 0, "0 or more"),
            "fresh": (not (self.fresh and self.resume), "False together with resume"),
        }
        for name, (holds, expected) in checks.items():
            if not holds:
                raise InputError(f"train: expected {name} to be {expected}, got {getattr(self, name)!r}")

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {**dataclasses.asdict(self), "out": str(self.out)}

    def fingerprint(self, data: Dataset) -> dict[str, Any]:
        """What has to be equal for a run to continue from a checkpoint."""
        fields = {name: value for name, value in self.as_dict().items() if name not in _FREE_FIELDS}
        return {**fields, "data": data.fingerprint(), "plain": self.memory == "plain"}

# SPDX-License-Identifier: Apache-2.0
"""What a training run can be told, and what of it a resumed run must share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdense._choices import AUGMENTATIONS, DTYPES, SCHEDULES, TRAIN_MEMORY
from fastdense._support import InputError
from fastdense.train.data import DIGITS, Dataset
from fastdense.train.samples import default_workers

# What may change between the parts of a resumed run: where it runs and how it writes. Bits are kept only as far as
# the machine gives the same sums, so with the same number of threads.
_FREE_FIELDS = {"data", "size", "memory", "budget", "device", "threads", "workers"}
_FREE_FIELDS |= {"out", "resume", "fresh", "checkpoint_seconds", "tensorboard"}
# What a resumed run may be told anew; it goes on as before where it is not.
CHANGEABLE: dict[str, Any] = {"epochs": 10, "lr": 0.1}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run.

    Attributes:
        model: a name of :func:`fastdense.models.list`.
        model_kwargs: arguments of that model's function; the number of classes follows the data.
        data: ``"digits"``, or a folder with one sub-folder of pictures a class.
        size: side of an image in pixels; None takes 16 for digits and 32 for a folder.
        augment: ``"crop"``, crops of random size and aspect, and the middle of a larger picture for testing, as usual
            for ImageNet; ``"shift"``, the middle moved by up to an eighth, as usual for CIFAR; or ``"none"``. Pictures
            of a folder are mirrored at random by the first two. None takes ``"shift"`` for digits, else ``"crop"``.
        weights: a file to begin with: a ``state_dict`` (.pt, .pth, .safetensors) with the names of the model, for
            DenseNets those of torchvision, timm or MONAI, or a checkpoint of this function. A last layer for another
            number of classes is left out.
        freeze: whether only the last layer is trained; norms of the others use the statistics of `weights`.
        epochs: passes over the training images; None takes 10, or what the checkpoint was made with. A resumed run
            may be given more.
        batch: images per step, at most, of all processes together; an epoch is cut into steps of equal size.
        lr: learning rate of the first step; None takes 0.1, or what the checkpoint was made with. A resumed run may
            be given another, by which all its rates are then computed.
        schedule: ``"cosine"``, along which the rate falls to 0, or ``"steps"``, a tenth of it at 50 % and at 75 %.
        warmup: epochs, or a part of one, in which the rate rises linearly to `lr`.
        label_smoothing: share of the probability that is spread over all classes, in [0, 1).
        ema: decay of a moving average of weights and running statistics, which is then what is tested; 0 for none.
        weight_decay: L2 penalty of all parameters.
        momentum: Nesterov momentum in [0, 1).
        memory: ``"balanced"``, ``"min"``, or ``"plain"`` for the same model in plain PyTorch; a model without dense
            blocks takes ``"balanced"`` only.
        budget: of tensor memory, like ``"8GiB"``, in the place of `memory`: see :func:`fastdense.plan_memory`.
        device: a torch device, e.g. ``"cpu"`` or ``"cuda"``.
        dtype: ``"float32"``, or ``"bfloat16"`` or ``"float16"`` for autocast.
        seed: of weights, order and augmentation.
        threads: CPU threads; 0 leaves the choice to torch.
        workers: processes that read pictures ahead, 0 for none; None takes one per CPU, up to 4, and none for digits.
            Results do not depend on it.
        out: the folder of ``checkpoint.pt``, ``metrics.json``, ``log.csv`` and ``curves.png``.
        tensorboard: whether to write what is in the log to a folder ``tensorboard`` in ``out`` as well.
        resume: whether to continue from the checkpoint in ``out``; without one the run starts from the beginning.
        fresh: whether to start from the beginning although there is a checkpoint, which is deleted.
        checkpoint_seconds: time between checkpoints inside an epoch; 0 writes one after each step.
    """

    model: str = "densenet_cifar"
    model_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: str = DIGITS
    size: int | None = None
    augment: str | None = None
    weights: Path | None = None
    freeze: bool = False
    epochs: int | None = None
    batch: int = 64
    lr: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    weight_decay: float = 1e-4
    momentum: float = 0.9
    memory: str = "balanced"
    budget: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    threads: int = 0
    workers: int | None = None
    out: Path = Path("runs/train")
    resume: bool = False
    fresh: bool = False
    checkpoint_seconds: float = 60.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Refuses values that cannot be trained with.

        Raises:
            InputError: a value is out of its range.
        """
        checks = {
            "epochs": (self.epochs is None or self.epochs >= 1, "at least 1"),
            "batch": (self.batch >= 1, "at least 1"),
            "size": (self.size is None or self.size >= 1, "at least 1"),
            "augment": (self.augment in (None, *AUGMENTATIONS), f"one of {', '.join(AUGMENTATIONS)}"),
            "freeze": (self.weights is not None or not self.freeze, "False without weights to begin with"),
            "lr": (self.lr is None or (self.lr > 0 and math.isfinite(self.lr)), "a positive number"),
            "schedule": (self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            "warmup": (0 <= self.warmup < (self.epochs or math.inf), "0 or more, and less than epochs"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "ema": (0 <= self.ema < 1, "in [0, 1)"),
            "weight_decay": (self.weight_decay >= 0 and math.isfinite(self.weight_decay), "0 or more"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "memory": (self.memory in TRAIN_MEMORY, f"one of {', '.join(TRAIN_MEMORY)}"),
            "budget": (self.budget is None or self.memory == "balanced", "None where memory is given"),
            "dtype": (self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            "seed": (0 <= self.seed < 2**63, "in [0, 2**63)"),
            "threads": (self.threads >= 0, "0 or more"),
            "workers": (self.workers is None or self.workers >= 0, "0 or more"),
            "checkpoint_seconds": (self.checkpoint_seconds >= 0, "0 or more"),
            "fresh": (not (self.fresh and self.resume), "False together with resume"),
        }
        for name, (holds, expected) in checks.items():
            if not holds:
                raise InputError(f"train: expected {name} to be {expected}, got {getattr(self, name)!r}")

    def completed(self, saved: Mapping[str, Any]) -> TrainConfig:
        """With values for what was left open: those of a checkpoint's configuration, or the defaults."""
        is_open = [name for name in CHANGEABLE if getattr(self, name) is None]
        values = {name: saved.get(name, CHANGEABLE[name]) for name in is_open}
        if self.augment is None:
            values["augment"] = "shift" if self.data == DIGITS else "crop"
        if self.workers is None:
            values["workers"] = 0 if self.data == DIGITS else default_workers()
        return dataclasses.replace(self, **values)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        weights = None if self.weights is None else str(self.weights)
        return {**dataclasses.asdict(self), "out": str(self.out), "weights": weights}

    def fingerprint(self, data: Dataset) -> dict[str, Any]:
        """What has to be equal for a run to continue from a checkpoint."""
        fields = {name: value for name, value in self.as_dict().items() if name not in _FREE_FIELDS}
        weights = None if self.weights is None else self.weights.name
        return {**fields, "data": data.fingerprint(), "plain": self.memory == "plain", "weights": weights}

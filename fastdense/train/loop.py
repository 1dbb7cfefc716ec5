# SPDX-License-Identifier: Apache-2.0
"""The training loop."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdense import models
from fastdense._extension import build_info
from fastdense._support import InputError, Interrupted, extra, write_atomically, write_json
from fastdense.fusion.convert import restore
from fastdense.train import checkpoint
from fastdense.train import processes as several
from fastdense.train.config import TrainConfig
from fastdense.train.data import Dataset, EpochPlan, Split, augment, load, pixels, plan_epoch
from fastdense.train.interrupts import Interrupts, deferred


class NonFiniteLossError(InputError):
    """The loss became infinite or NaN; the last checkpoint is from before."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        test_accuracy: share of the test images that the final weights classify correctly.
        history: a dict an epoch with ``epoch``, ``loss`` and ``accuracy`` (training, with augmentation, running),
            ``test_loss``, ``test_accuracy``, ``lr`` (of the last step) and ``seconds``.
        paths: the files written.
    """

    test_accuracy: float
    history: list[dict[str, Any]]
    paths: list[Path]


@dataclasses.dataclass
class Progress:
    """How far a run has come; the sums are of the epoch that is under way.

    Attributes:
        epoch: complete epochs.
        position: complete steps of the epoch under way.
        step: complete steps in all.
        loss_sum: of the losses of `seen` images.
        correct: images classified correctly.
        seen: images of this epoch.
        seconds: time spent in steps of this epoch.
        history: a dict an epoch, see :class:`TrainResult`.
    """

    epoch: int = 0
    position: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def next_epoch(self) -> Progress:
        """The start of the next epoch."""
        return Progress(epoch=self.epoch + 1, step=self.step, history=self.history)


def train(config: TrainConfig, progress: bool = True) -> TrainResult:
    """Trains a model and writes ``checkpoint.pt``, ``metrics.json`` and ``curves.png``.

    A run that ended at any moment and continues with ``resume`` ends with the same bits as one that ran through, with
    the same machine, threads, memory mode and number of processes. Under ``torchrun`` the processes share every batch
    and average their gradients; the first one writes the files.

    Args:
        config: what to do.
        progress: whether to show a progress bar on standard error.

    Raises:
        InputError: the configuration, the data or the checkpoint cannot be used.
        NonFiniteLossError: the loss became infinite or NaN.
        Interrupted: Ctrl-C; the checkpoint holds the last step. It is a KeyboardInterrupt.
    """
    path = config.out / "checkpoint.pt"
    if path.exists() and not (config.resume or config.fresh):
        raise InputError(
            f"train: expected {config.out} to hold no checkpoint, got {path};"
            " continue it with --resume, or start anew with --fresh"
        )
    device = find_device(config.device)
    _make_folder(config.out)
    data = load(config.data, config.size)
    with several.started(device) as processes, _surroundings(config, processes.device), deferred() as interrupts:
        run = _Run(config, data, processes, path, progress, interrupts)
        processes.wait()  # all have seen whether there is a checkpoint
        if config.fresh and processes.is_first:
            path.unlink(missing_ok=True)
        if config.resume and processes.gather(path.exists())[0]:
            run.resume()
        run.train()
        return _write_results(run)


def learning_rate(step: int, steps: int, start: float, schedule: str = "cosine") -> float:
    """The rate of a step of `steps`: on a cosine from `start` to 0, or by steps a tenth at 50 % and at 75 %."""
    if schedule == "steps":
        return start * 0.1 ** ((2 * step >= steps) + (4 * step >= 3 * steps))
    return 0.5 * start * (1 + math.cos(math.pi * step / steps))


def make_model(config: TrainConfig, data: Dataset, processes: int = 1) -> nn.Module:
    """The configured model with random weights, on the CPU, for batches shared by so many processes.

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
        raise InputError(f"train: expected arguments that make a model, got {config.model!r}: {error}") from error
    smallest = len(data.train) // math.ceil(len(data.train) / config.batch) // processes  # part of a batch
    try:
        with torch.no_grad():
            made = model.eval()(torch.zeros(1, 3, data.size, data.size))
            copy.deepcopy(model).train()(torch.zeros(smallest, 3, data.size, data.size))
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"train: expected size and batch to be large enough for {config.model}, "
            f"got {data.size} and {smallest} images in the smallest batch: {reason}"
        ) from error
    if made.shape != (1, classes):
        raise InputError(f"train: expected a model that classifies images, got {config.model}")
    return restore(model) if config.memory == "plain" else model


class _Run:
    """One training run with everything that changes while it goes on."""

    def __init__(
        self,
        config: TrainConfig,
        data: Dataset,
        processes: several.Processes,
        path: Path,
        progress: bool,
        interrupts: Interrupts,
    ) -> None:
        self.config = config
        self.data = data
        self.processes = processes
        self.device = device = processes.device
        self.path = path
        self.show_progress = progress and processes.is_first
        self.interrupts = interrupts
        torch.manual_seed(config.seed)
        self.model = make_model(config, data, processes.world).to(device)
        self.network = processes.wrap(self.model)
        torch.manual_seed(config.seed + processes.rank)  # dropout differs, weights do not
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
        self.scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=config.dtype == "float16")
        self.progress = Progress()
        self.fingerprint = config.fingerprint(data) | {"processes": processes.world}
        self.epoch_steps = math.ceil(len(data.train) / config.batch)
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Goes back to the state of the checkpoint."""
        first = checkpoint.load(self.path, self.fingerprint) if self.processes.is_first else None
        state = self.processes.gather(first)[0]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        rng = state["rng"][self.processes.rank]
        torch.set_rng_state(rng["cpu"])
        if self.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.device)

    def save(self) -> None:
        """Writes the checkpoint."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        states = self.processes.gather(rng)
        self.processes.same_buffers(self.model)
        self.saved_at = time.monotonic()
        if not self.processes.is_first:
            return
        state = {
            "config": self.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "rng": states,
        }
        checkpoint.save(self.path, state)

    def stop(self) -> NoReturn:
        """Writes a checkpoint of the last step and ends the run, as Ctrl-C asks."""
        self.save()
        if not self.processes.is_first:
            raise KeyboardInterrupt
        step, steps = self.progress.step, self.epoch_steps * self.config.epochs
        raise Interrupted(f"stopped after step {step} of {steps}, which {self.path} holds. Go on with:", resumes=True)

    def train(self) -> None:
        """Trains the epochs that are left."""
        while self.progress.epoch < self.config.epochs:
            self._train_epoch()
            self._end_epoch()

    def _train_epoch(self) -> None:
        """Trains what is left of the epoch under way."""
        with extra("cli"):
            from tqdm import tqdm
        now = self.progress
        plan = plan_epoch(self.data, self.config.seed, now.epoch)
        self.model.train()
        with tqdm(
            total=len(self.data.train),
            initial=now.seen,
            desc=f"epoch {now.epoch + 1}/{self.config.epochs}",
            unit=" images",
            disable=not self.show_progress,
        ) as bar:
            while now.position < self.epoch_steps:
                start = time.perf_counter()
                seen = self._train_step(plan)
                now.seconds += time.perf_counter() - start
                bar.set_postfix(loss=f"{now.loss_sum / now.seen:.4f}", accuracy=f"{now.correct / now.seen:.4f}")
                bar.update(seen)
                is_late = time.monotonic() - self.saved_at >= self.config.checkpoint_seconds
                late, asked = self.processes.total(is_late, self.interrupts.asked)
                if asked:
                    self.stop()
                if late and now.position < self.epoch_steps:
                    self.save()

    def _train_step(self, plan: EpochPlan) -> int:
        """Trains on the next batch and returns its number of images."""
        now, count = self.progress, len(self.data.train)
        first, last = (count * (now.position + more) // self.epoch_steps for more in (0, 1))
        images, labels = self._train_batch(plan, self.processes.share(slice(first, last)))
        share = self.processes.world * len(labels) / (last - first)  # gradients are averaged over the processes
        steps = self.epoch_steps * self.config.epochs
        rate = learning_rate(now.step, steps, self.config.lr, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        logits = self._forward(self.network, images)
        loss = functional.cross_entropy(logits, labels)
        self.scaler.scale(loss * share).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        loss_sum, correct = self.processes.total(float(loss.detach()) * len(labels), _count_correct(logits, labels))
        value = loss_sum / (last - first)
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"train: expected a finite loss, got {value} in step {now.step + 1} (epoch {now.epoch + 1}, learning"
                f" rate {rate:.3g}); choose a smaller lr. The last checkpoint is from before"
            )
        now.loss_sum += loss_sum
        now.correct += int(correct)
        now.seen += last - first
        now.position += 1
        now.step += 1
        return last - first

    def _train_batch(self, plan: EpochPlan, where: slice) -> tuple[Tensor, Tensor]:
        """The augmented, normalised images at these positions of the epoch, and their labels."""
        chosen = plan.order[where]
        images = augment(pixels(self.data.train.images[chosen]), plan.shifts[where], plan.flips[where])
        return self.data.normalise(images.to(self.device)), self.data.train.labels[chosen].to(self.device)

    def _forward(self, network: nn.Module, images: Tensor) -> Tensor:
        """Logits in float32, computed under autocast for the 16-bit types."""
        dtype = getattr(torch, self.config.dtype)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not torch.float32):
            return network(images).float()

    def _end_epoch(self) -> None:
        """Measures, adds to the history and writes the checkpoint."""
        now = self.progress
        self.processes.same_buffers(self.model)
        test_loss, test_accuracy = self.evaluate(self.data.test)
        now.history.append(
            {
                "epoch": now.epoch + 1,
                "loss": now.loss_sum / now.seen,
                "accuracy": now.correct / now.seen,
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "lr": self.optimizer.param_groups[0]["lr"],
                "seconds": now.seconds,
            }
        )
        self.progress = now.next_epoch()
        self.save()

    @torch.no_grad()
    def evaluate(self, split: Split) -> tuple[float, float]:
        """Mean loss and share of correct images, without augmentation."""
        self.model.eval()
        loss, correct = 0.0, 0
        for stored, labels in zip(
            split.images.split(self.config.batch), split.labels.split(self.config.batch), strict=True
        ):
            logits = self._forward(self.model, self.data.normalise(pixels(stored).to(self.device)))
            labels = labels.to(self.device)
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
            correct += _count_correct(logits, labels)
            if any(self.processes.total(self.interrupts.asked)):
                self.stop()
        return loss / len(split), correct / len(split)


def _count_correct(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(1) == labels).sum())


def find_device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        InputError: torch knows no such device, or finds none.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"train: expected device to be one of torch's, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"train: expected device to be there, got {name!r} but torch finds no CUDA GPU")
    return device


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"train: expected out to be a folder that can be written, got {path}: {error}") from error


@contextlib.contextmanager
def _surroundings(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Threads, random numbers and cuDNN's choices for the time of a run; all are put back behind it."""
    threads = torch.get_num_threads()
    devices = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with torch.random.fork_rng(devices=devices), cudnn:
        if config.threads:
            torch.set_num_threads(config.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _write_results(run: _Run) -> TrainResult:
    """Writes metrics and curves, in the first process."""
    history = run.progress.history
    accuracy = history[-1]["test_accuracy"]
    metrics, curves = (run.config.out / name for name in ("metrics.json", "curves.png"))
    if not run.processes.is_first:
        return TrainResult(accuracy, history, [])
    write_json(
        metrics,
        {
            "config": run.config.as_dict(),
            "versions": {"fastdense": build_info()["version"], "torch": torch.__version__},
            "classes": run.data.classes,
            "images": {
                "train": len(run.data.train),
                "test": len(run.data.test),
                "skipped": len(run.data.skipped),
                "size": run.data.size,
            },
            "skipped": run.data.skipped,
            "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
            "test_accuracy": accuracy,
            "history": history,
        },
    )
    save_curves(history, curves)
    return TrainResult(accuracy, history, [run.path, metrics, curves])


def save_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Draws loss and accuracy per epoch and writes the picture."""
    with extra("cli"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [entry["epoch"] for entry in history]
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        axes.plot(epochs, [entry[key] for entry in history], marker=".", color="#9aa5b1", label="training")
        axes.plot(epochs, [entry[f"test_{key}"] for entry in history], marker=".", color="#1f7a5c", label="test")
        axes.set_xlabel("epoch")
        axes.set_ylabel(key)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_atomically(path, lambda file: file.write(picture.getvalue()))

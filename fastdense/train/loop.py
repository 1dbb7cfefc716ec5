# SPDX-License-Identifier: Apache-2.0
"""The training loop."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdense._extension import build_info
from fastdense._support import InputError, Interrupted, extra, write_json
from fastdense.train import checkpoint
from fastdense.train import processes as several
from fastdense.train.config import CHANGEABLE, TrainConfig
from fastdense.train.data import Dataset, load
from fastdense.train.finite import NonFiniteLossError, find_non_finite
from fastdense.train.interrupts import Interrupts, deferred
from fastdense.train.lock import locked
from fastdense.train.network import average, fit_into, freeze, load_weights, make_model, set_training
from fastdense.train.results import describe, open_tensorboard, save_curves, save_log
from fastdense.train.samples import Batches, Samples


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of a training run.

    Attributes:
        test_accuracy: share of the test images that the final weights classify correctly.
        history: a dict an epoch with ``epoch``, ``loss`` and ``accuracy`` (training, with augmentation, running),
            ``test_loss``, ``test_accuracy`` (of the averaged weights where there are any), ``lr`` (of the last step),
            ``seconds`` in steps, ``waiting`` for images in seconds, and which of the two is the ``limit``.
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
        waiting: time spent waiting for its images.
        corrupt: a line for each file that could not be read.
        history: a dict an epoch, see :class:`TrainResult`.
    """

    epoch: int = 0
    position: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    corrupt: list[str] = dataclasses.field(default_factory=list)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def next_epoch(self) -> Progress:
        """The start of the next epoch."""
        return Progress(epoch=self.epoch + 1, step=self.step, corrupt=self.corrupt, history=self.history)


def train(config: TrainConfig, progress: bool = True) -> TrainResult:
    """Trains a model and writes ``checkpoint.pt``, ``metrics.json``, ``log.csv`` and ``curves.png``.

    A run that ended at any moment and continues with ``resume`` ends with the same bits as one that ran through, with
    the same machine, threads, memory mode and number of processes; the number of workers may differ. Under
    ``torchrun`` the processes share every batch and average their gradients; the first one writes the files.

    Args:
        config: what to do.
        progress: whether to show a progress bar on standard error.

    Raises:
        InputError: the configuration, the data or the checkpoint cannot be used.
        NonFiniteLossError: the loss, the test loss or a weight became infinite or NaN.
        Interrupted: Ctrl-C; the checkpoint holds the last step. It is a KeyboardInterrupt.
    """
    path = config.out / "checkpoint.pt"
    with (
        several.started(find_device(config.device)) as processes,
        _alone(config, processes),
        deferred() as interrupts,
    ):
        if path.exists() and not (config.resume or config.fresh):
            raise InputError(
                f"train: {config.out} already has a checkpoint, {path};"
                " continue it with --resume, or start anew with --fresh"
            )
        data = load(config.data, config.size)
        saved = None
        if config.resume and path.exists() and processes.is_first:
            fingerprint = config.completed({}).fingerprint(data) | {"processes": processes.world}
            saved = checkpoint.load(path, fingerprint, tuple(CHANGEABLE))
        elif config.resume and processes.is_first:
            checkpoint.say_that_there_is_none(path)
        saved = processes.gather(saved)[0]
        config = config.completed(saved["config"] if saved else {})
        run = _Run(config, data, processes, path, progress, interrupts)
        if not saved:
            run.begin()
        if config.fresh and processes.is_first:
            path.unlink(missing_ok=True)
        if saved:
            with checkpoint.restoring(path):
                run.restore(saved)
        run.train()
        return _write_results(run)


def learning_rate(step: int, steps: int, peak: float, schedule: str = "cosine", warmup: int = 0) -> float:
    """The rate of a step of `steps`.

    In the first `warmup` steps it rises linearly to `peak`. Then it falls on a cosine to 0, or by steps: a tenth from
    50 % of all steps on, a hundredth from 75 % on.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "steps":
        return peak * 0.1 ** ((2 * step >= steps) + (4 * step >= 3 * steps))
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


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
        assert config.epochs is not None and config.lr is not None  # it is completed
        assert config.augment is not None and config.workers is not None
        self.config, self.epochs, self.lr = config, config.epochs, config.lr
        self.data = data
        self.processes = processes
        self.device = device = processes.device
        self.path = path
        self.show_progress = progress and processes.is_first
        self.interrupts = interrupts
        samples = Samples(data, config.augment, config.seed)
        self.batches = Batches(samples, config.batch, config.workers, processes)
        torch.manual_seed(config.seed)
        smallest = len(data.train) // self.batches.steps // processes.world  # part of a batch
        self.model = make_model(config, data, smallest).to(device)
        if config.freeze:
            freeze(self.model)
        if config.budget is not None:
            batch = -(-len(data.train) // self.batches.steps)
            words = fit_into(self.model, config, data.size, -(-batch // processes.world))
            print(f"fastdense: {words}", file=sys.stderr)
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False) if config.ema else None
        self.network = processes.wrap(self.model)
        torch.manual_seed(config.seed + processes.rank)  # dropout differs, weights do not
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=self.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
        self.scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=config.dtype == "float16")
        self.progress = Progress()
        self.fingerprint = config.fingerprint(data) | {"processes": processes.world}
        self.saved_at, self.saved_step, self.begun = time.monotonic(), 0, 0

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.batches.steps * self.epochs

    def begin(self) -> None:
        """Loads the weights to begin with, if there are any."""
        if self.config.weights is None:
            return
        words = load_weights(self.model, self.config.weights)
        if self.averaged is not None:
            self.averaged.load_state_dict(self.model.state_dict())
        for word in words if self.processes.is_first else ():
            print(f"fastdense: {word}", file=sys.stderr)

    def restore(self, saved: dict[str, Any]) -> None:
        """Goes on from a checkpoint; says what has changed since.

        Raises:
            InputError: more epochs are complete than were asked for.
        """
        if saved["progress"].keys() != dataclasses.asdict(self.progress).keys():
            raise ValueError("another kind of progress")
        now = self.progress = Progress(**saved["progress"])
        complete = now.epoch + (now.position > 0)
        if self.epochs < complete:
            raise InputError(
                f"train: expected epochs to be at least {complete}, with which {self.path} was made, got {self.epochs}"
            )
        for name in CHANGEABLE:
            before, after = saved["config"][name], getattr(self.config, name)
            if before != after and self.processes.is_first:
                print(f"fastdense: {name} was {before} and is {after} from step {now.step + 1} on", file=sys.stderr)
        self.saved_step = self.begun = now.step
        self.batches.corrupt.update(now.corrupt)
        self.model.load_state_dict(saved["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(saved["averaged"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        rng = saved["rng"][self.processes.rank]
        torch.set_rng_state(rng["cpu"])
        if self.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.device)

    def save(self) -> None:
        """Writes the checkpoint, of finite numbers only."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        states = self.processes.gather({"rng": rng, "corrupt": self.batches.corrupt})
        self.progress.corrupt = sorted(set().union(*(state["corrupt"] for state in states)))
        self._same_buffers()
        bad = find_non_finite(self.model)
        if bad:
            raise self._non_finite(f"network, got an infinite or NaN {bad} after step {self.progress.step}")
        self.saved_at, self.saved_step = time.monotonic(), self.progress.step
        if not self.processes.is_first:
            return
        state = {
            "config": self.fingerprint,
            "data": self.data.describe(),
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "rng": [state["rng"] for state in states],
        }
        checkpoint.save(self.path, state)

    def _non_finite(self, what: str) -> NonFiniteLossError:
        return NonFiniteLossError(what, self.lr, self.progress.step, self.saved_step, self.begun)

    def stop(self) -> NoReturn:
        """Writes a checkpoint of the last step and ends the run, as Ctrl-C asks."""
        self.save()
        if not self.processes.is_first:
            raise KeyboardInterrupt
        done = f"step {self.progress.step} of {self.steps}, which {self.path} holds"
        raise Interrupted(f"stopped after {done}. Go on with:", resumes=True)

    def _same_buffers(self) -> None:
        self.processes.same_buffers(self.model)
        if self.averaged is not None:
            self.processes.same_buffers(self.averaged)

    def train(self) -> None:
        """Trains the epochs that are left."""
        first = self.processes.is_first
        tensorboard = self.config.tensorboard and first
        add = open_tensorboard(self.config.out / "tensorboard", self.progress.epoch) if tensorboard else None
        while self.progress.epoch < self.epochs:
            self._train_epoch()
            entry = self._end_epoch()
            if first:
                save_log(self.progress.history, self.config.out / "log.csv")
            if add:
                add(entry)

    def _train_epoch(self) -> None:
        """Trains what is left of the epoch under way."""
        with extra("cli"):
            from tqdm import tqdm
        now = self.progress
        set_training(self.model)
        batches = self.batches.train(now.epoch, now.position)
        with tqdm(
            total=len(self.data.train),
            initial=now.seen,
            desc=f"epoch {now.epoch + 1}/{self.epochs}",
            unit=" images",
            disable=not self.show_progress,
        ) as bar:
            while now.position < self.batches.steps:
                start = time.perf_counter()
                images, labels = next(batches)
                ready = time.perf_counter()
                seen = self._train_step(images, labels)
                now.waiting += ready - start
                now.seconds += time.perf_counter() - ready
                bar.set_postfix(loss=f"{now.loss_sum / now.seen:.4f}", accuracy=f"{now.correct / now.seen:.4f}")
                bar.update(seen)
                is_late = time.monotonic() - self.saved_at >= self.config.checkpoint_seconds
                late, asked = self.processes.total(is_late, self.interrupts.asked)
                if asked:
                    self.stop()
                if late and now.position < self.batches.steps:
                    self.save()

    def _train_step(self, images: Tensor, labels: Tensor) -> int:
        """Trains on this process's part of the next batch and returns the number of images of all."""
        now, config = self.progress, self.config
        where = self.batches.bounds(now.position)
        count = where.stop - where.start
        share = self.processes.world * len(labels) / count  # gradients are averaged over the processes
        warmup = round(config.warmup * self.batches.steps)
        rate = learning_rate(now.step, self.steps, self.lr, config.schedule, warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        labels = labels.to(self.device)
        logits = self._forward(self.network, images)
        loss = functional.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        self.scaler.scale(loss * share).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        loss_sum, correct = self.processes.total(float(loss.detach()) * len(labels), _count_correct(logits, labels))
        if not math.isfinite(loss_sum):
            what = f"loss, got {loss_sum / count} in step {now.step + 1} (epoch {now.epoch + 1}, rate {rate:.3g})"
            raise self._non_finite(what)
        now.loss_sum += loss_sum
        now.correct += int(correct)
        now.seen += count
        now.position += 1
        now.step += 1
        if self.averaged is not None:
            average(self.averaged, self.model, config.ema, now.step)
        return count

    def _forward(self, network: nn.Module, images: Tensor) -> Tensor:
        """Logits in float32 of images as they are stored, computed under autocast for the 16-bit types."""
        dtype = getattr(torch, self.config.dtype)
        images = self.data.normalise(images.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not torch.float32):
            return network(images).float()

    def _end_epoch(self) -> dict[str, Any]:
        """Measures, adds to the history and writes the checkpoint."""
        now = self.progress
        self._same_buffers()
        test_loss, test_accuracy = self.evaluate()
        if not math.isfinite(test_loss):
            raise self._non_finite(f"test loss, got {test_loss} after step {now.step}")
        entry = {
            "epoch": now.epoch + 1,
            "loss": now.loss_sum / now.seen,
            "accuracy": now.correct / now.seen,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": now.seconds,
            "waiting": now.waiting,
            "limit": "images" if now.waiting > 0.1 * (now.seconds + now.waiting) else "steps",
        }
        now.history.append(entry)
        self.progress = now.next_epoch()
        self.save()
        if self.show_progress:
            print(describe(entry, self.epochs), file=sys.stderr)
        return entry

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean loss and share of correct test images, of the averaged weights where there are any."""
        model = (self.averaged if self.averaged is not None else self.model).eval()
        loss, correct, seen = 0.0, 0, 0
        for images, labels in self.batches.test():
            if len(labels):
                labels = labels.to(self.device)
                logits = self._forward(model, images)
                loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
                correct += _count_correct(logits, labels)
                seen += len(labels)
            if any(self.processes.total(self.interrupts.asked)):
                self.stop()
        loss, right, count = self.processes.total(loss, correct, seen)
        if not count:
            raise InputError("train: expected test pictures that can be read, got none")
        return loss / count, right / count


def _count_correct(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(1) == labels).sum())


def find_device(name: str, op: str = "train") -> torch.device:
    """The device of a name; messages begin with ``op``.

    Raises:
        InputError: torch knows no such device, or finds none.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"{op}: expected device to be a torch device such as 'cpu' or 'cuda', got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{op}: device {name!r} is not available: torch finds no CUDA GPU")
    return device


@contextlib.contextmanager
def _alone(config: TrainConfig, processes: several.Processes) -> Iterator[None]:
    """In a folder that no other run writes to, and in :func:`_surroundings` of its own."""
    folder = locked(config.out) if processes.is_first else contextlib.nullcontext()
    with folder, _surroundings(config, processes.device):
        yield


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
    log, metrics, curves = (run.config.out / name for name in ("log.csv", "metrics.json", "curves.png"))
    if not run.processes.is_first:
        return TrainResult(accuracy, history, [])
    write_json(
        metrics,
        {
            "config": run.config.as_dict(),
            "versions": {"fastdense": build_info()["version"], "torch": torch.__version__},
            **run.data.describe(),
            "images": {
                "train": len(run.data.train),
                "test": len(run.data.test),
                "skipped": len(run.progress.corrupt),
            },
            "skipped": run.progress.corrupt,
            "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
            "test_accuracy": accuracy,
            "history": history,
        },
    )
    save_curves(history, curves)
    return TrainResult(accuracy, history, [run.path, log, metrics, curves])

# SPDX-License-Identifier: Apache-2.0
"""Trains super-resolution networks on pictures held in memory: patches, L1, Adam, a moving average of the weights."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastdense import models
from fastdense._choices import DTYPES
from fastdense._support import InputError, Interrupted, extra, first_of, write_json
from fastdense.bench.photographs import SCIKIT_IMAGE_FILES, scikit_image_folder
from fastdense.models import SuperResolutionNet, save_super_resolution
from fastdense.ops.bicubic import bicubic_resize
from fastdense.sr.images import CorruptImageError, read_bytes, search_folder
from fastdense.sr.quality import evaluate_image, luminance, smallest_measured
from fastdense.train import checkpoint
from fastdense.train.finite import NonFiniteLossError, find_non_finite
from fastdense.train.interrupts import Interrupts, deferred
from fastdense.train.lock import locked
from fastdense.train.loop import find_device
from fastdense.train.network import average

PHOTOGRAPHS = "photographs"
# Photographs that are not trained on.
HELD_OUT = ("chelsea.png", "coffee.png")


@dataclasses.dataclass(frozen=True)
class SuperResolutionConfig:
    """Configuration of a training run.

    Attributes:
        model: a super-resolution network of :func:`fastdense.models.list`.
        model_kwargs: arguments of that model's function beside the scale.
        scale: how much larger its pictures are.
        data: ``"photographs"``, those of scikit-image, or a folder of pictures, every fifth of which is held out.
        steps: number of steps.
        batch: patches per step.
        patch: side of a patch before it is enlarged, in pixels.
        lr: learning rate, which falls to zero along a cosine; None takes 1e-3, or what the checkpoint was made with.
        average: decay of the moving average of the weights, which is what is evaluated and saved.
        device: a torch device, e.g. ``"cpu"`` or ``"cuda"``.
        dtype: ``"float32"``, or ``"bfloat16"`` or ``"float16"`` for autocast.
        seed: of weights and patches.
        threads: CPU threads, 0 for torch's choice.
        out: folder of ``model.pt``, ``checkpoint.pt`` and ``metrics.json``.
        resume, fresh: continue from the checkpoint, or start anew although there is one.
        checkpoint_seconds: between checkpoints.
    """

    model: str = "srcnn"
    model_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    scale: int = 2
    data: str = PHOTOGRAPHS
    steps: int = 3000
    batch: int = 16
    patch: int = 32
    lr: float | None = None
    average: float = 0.995
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    threads: int = 0
    out: Path = Path("runs/sr")
    resume: bool = False
    fresh: bool = False
    checkpoint_seconds: float = 60.0

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share, but for the learning rate."""
        free = ("data", "device", "threads", "out", "resume", "fresh", "checkpoint_seconds")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in free}


@dataclasses.dataclass(frozen=True)
class SuperResolutionResult:
    """PSNR of held-out pictures, dB: bicubic, network; the files that were written; pictures that were left out."""

    bicubic_psnr: float
    psnr: float
    paths: list[Path]
    skipped: list[str] = dataclasses.field(default_factory=list)


class Patches:
    """Pairs of small and large patches; those of a step are a function of seed and step.

    pictures: uint8 ``[H, W, 3]`` or ``[H, W]``, each at least a patch large.
    """

    def __init__(self, pictures: list[NDArray[numpy.uint8]], colours: int, scale: int, side: int) -> None:
        self.side, self.scale = side, scale
        large = [_planes(picture, colours, scale) for picture in pictures]
        small = [bicubic_resize(planes, scale_factor=1 / scale, preset="matlab") for planes in large]
        self.pairs = list(zip(small, large, strict=True))
        # By area, so that all places are equally likely.
        areas = numpy.array([s.shape[2] * s.shape[3] for s, _ in self.pairs], float)
        self.shares = areas / areas.sum()

    def draw(self, seed: int, step: int, count: int) -> tuple[Tensor, Tensor]:
        """``[count, colours, side, side]`` and the same at ``scale`` times the size, in [0, 1], turned and mirrored."""
        random = numpy.random.default_rng([seed, step])
        drawn = [self._one(random) for _ in range(count)]
        small, large = (torch.cat(patches).float() / 255 for patches in zip(*drawn, strict=True))
        return small, large

    def _one(self, random: numpy.random.Generator) -> tuple[Tensor, Tensor]:
        small, large = self.pairs[random.choice(len(self.pairs), p=self.shares)]
        top, left = (int(random.integers(size - self.side + 1)) for size in small.shape[2:])
        turns, mirrored = int(random.integers(4)), bool(random.integers(2))

        def cut(planes: Tensor, scale: int) -> Tensor:
            rows, columns = (
                slice(top * scale, (top + self.side) * scale),
                slice(left * scale, (left + self.side) * scale),
            )
            part = planes[:, :, rows, columns].rot90(turns, (2, 3))
            return part.flip(3) if mirrored else part

        return cut(small, 1), cut(large, self.scale)


def _planes(picture: NDArray[numpy.uint8], colours: int, scale: int) -> Tensor:
    height, width = (size - size % scale for size in picture.shape[:2])
    picture = picture[:height, :width]
    if colours == 1:
        return luminance(picture).to(torch.uint8)
    rgb = picture if picture.ndim == 3 else numpy.repeat(picture[..., None], 3, 2)
    return torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None]


def load_pictures(
    data: str, trained: int = 1, measured: int = 1
) -> tuple[list[NDArray[numpy.uint8]], list[NDArray[numpy.uint8]], list[str]]:
    """Pictures to train on and held-out ones, of at least so many pixels a side, and a line for each left out.

    Raises:
        InputError: there are none of one kind.
    """
    skipped: list[str] = []
    if data == PHOTOGRAPHS:
        folder = scikit_image_folder("train")
        files = [folder / name for name in SCIKIT_IMAGE_FILES if (folder / name).is_file()]
        held = [path.name in HELD_OUT for path in files]
    else:
        if not Path(data).is_dir():
            raise InputError(f"train: expected --data to be {PHOTOGRAPHS!r} or a folder, got {data}")
        found = search_folder(Path(data))
        files, skipped = found.pictures, list(found.failed)
        skipped += [line] if (line := found.left_out()) else []
        held = [at % 5 == 4 for at in range(len(files))]
    training: list[NDArray[numpy.uint8]] = []
    testing: list[NDArray[numpy.uint8]] = []
    for path, is_held in zip(files, held, strict=True):
        try:
            samples = read_bytes(path)
        except CorruptImageError as error:
            skipped.append(str(error))
            continue
        smallest, purpose = (measured, "measure on") if is_held else (trained, "cut patches from")
        height, width = samples.shape[:2]
        if min(height, width) < smallest:
            skipped.append(f"{path}: expected {smallest} pixels or more to {purpose}, got {width} x {height}")
            continue
        (testing if is_held else training).append(samples)
    if not training or not testing:
        usable = len(training) + len(testing)
        raise InputError(
            f"train: expected {data} to hold five pictures or more that can be used, got {usable}{first_of(skipped)}"
        )
    return training, testing, skipped


def train_super_resolution(config: SuperResolutionConfig, progress: bool = True) -> SuperResolutionResult:
    """Trains a network and writes it as ``model.pt`` for ``fastdense upscale`` and ``fastdense evaluate``.

    Small patches are made by MATLAB's bicubic from 8-bit pictures. A stopped run resumes from its checkpoint with the
    same patches. On the same machine, with the same number of threads, the weights are bit-identical.

    Raises:
        InputError: pictures, arguments or a checkpoint that cannot be used.
        NonFiniteLossError: the loss became infinite or NaN.
        Interrupted: Ctrl-C; the checkpoint holds the last step. It is a KeyboardInterrupt.
    """
    if min(config.steps, config.batch, config.patch) < 1:
        raise InputError("train: expected steps, batch and patch to be positive")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("train: expected one process for super-resolution, got several; start it without torchrun")
    if config.dtype not in DTYPES:
        raise InputError(f"train: expected dtype to be one of {', '.join(DTYPES)}, got {config.dtype!r}")
    with locked(config.out):
        return _train_alone(config, config.out / "checkpoint.pt", progress)


def _train_alone(config: SuperResolutionConfig, path: Path, progress: bool) -> SuperResolutionResult:
    if path.exists() and not config.resume and not config.fresh:
        raise InputError(f"train: {path} exists; continue it with --resume, or start anew with --fresh")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    saved = None
    if config.resume and path.exists():
        saved = checkpoint.load(path, config.fingerprint(), may_change=("lr",))
    elif config.resume:
        checkpoint.say_that_there_is_none(path)
    if config.lr is None:
        config = dataclasses.replace(config, lr=saved["config"]["lr"] if saved else 1e-3)
    run = _Run(config, path)
    least = config.patch * config.scale, smallest_measured(config.scale)
    training, testing, skipped = load_pictures(config.data, *least)
    patches = Patches(training, run.net.colours, config.scale, config.patch)
    first = 0
    if saved:
        with checkpoint.restoring(path):
            first = run.restore(saved)
    with deferred() as interrupts:
        run.steps(patches, first, progress, interrupts)
    averaged = run.averaged.eval()
    qualities = [evaluate_image(picture, config.scale, averaged)[0] for picture in testing]
    bicubic = sum(q.bicubic_psnr for q in qualities) / len(qualities)
    made = sum(q.psnr or 0.0 for q in qualities) / len(qualities)
    model, metrics = config.out / "model.pt", config.out / "metrics.json"
    save_super_resolution(averaged, model)
    numbers = {"bicubic_psnr": bicubic, "psnr": made, "pictures": len(testing), "skipped": skipped}
    write_json(metrics, {"config": config.fingerprint() | {"data": config.data}, **numbers})
    return SuperResolutionResult(bicubic, made, [model, metrics, path], skipped)


def _make(config: SuperResolutionConfig) -> SuperResolutionNet:
    known = [name for name in models.list() if models.is_super_resolution(name)]
    if config.model not in known:
        raise InputError(f"train: expected --model of --task sr to be one of {', '.join(known)}, got {config.model!r}")
    if "scale" in config.model_kwargs:
        raise InputError(f"train: expected --scale {config.model_kwargs['scale']}, got --set scale")
    try:
        net = models.create(config.model, **{"scale": config.scale, **config.model_kwargs})
    except TypeError as error:
        raise InputError(f"train: expected --set to name arguments of {config.model}: {error}") from error
    assert isinstance(net, SuperResolutionNet)
    return net


class _Run:
    """A network on its way: weights, their average, optimizer and the scaler of float16."""

    def __init__(self, config: SuperResolutionConfig, path: Path) -> None:
        assert config.lr is not None
        self.config, self.path, self.lr = config, path, config.lr
        self.saved_step = self.begun = 0
        self.device = find_device(config.device)
        self.net = _make(config).to(self.device)
        self.averaged = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.net.parameters(), self.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=1024.0, enabled=config.dtype == "float16")

    def steps(self, patches: Patches, first: int, progress: bool, interrupts: Interrupts) -> None:
        with extra("cli"):
            from tqdm import tqdm
        config, written = self.config, time.monotonic()
        bar = tqdm(range(first, config.steps), "train", config.steps, initial=first, leave=False, disable=not progress)
        for step in bar:
            rate = self.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self.step(*patches.draw(config.seed, step, config.batch))
            if not math.isfinite(loss):
                raise self.non_finite(f"loss, got {loss} in step {step + 1}", step)
            average(self.averaged, self.net, config.average, step + 1)
            bar.set_postfix_str(f"L1 {loss:.4f}", refresh=False)
            late = time.monotonic() - written >= config.checkpoint_seconds
            if late or interrupts.asked or step + 1 == config.steps:
                self.save(step + 1)
                written = time.monotonic()
            if interrupts.asked:
                done = f"step {step + 1} of {config.steps}, which {self.path} holds"
                raise Interrupted(f"stopped after {done}. Go on with:", resumes=True)

    def step(self, small: Tensor, large: Tensor) -> float:
        """The loss, in float32, before the step; weights stay where it is not finite."""
        dtype = getattr(torch, self.config.dtype)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not torch.float32):
            made = self.net(small.to(self.device)).float()
        loss = F.l1_loss(made, large.to(self.device))
        if math.isfinite(loss.item()):
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss.item()

    def save(self, step: int) -> None:
        bad = find_non_finite(self.net)
        if bad:
            raise self.non_finite(f"network, got an infinite or NaN {bad} after step {step}", step)
        self.saved_step = step
        state = {"net": self.net.state_dict(), "averaged": self.averaged.state_dict()}
        checkpoint.save(
            self.path,
            {
                "config": self.config.fingerprint(),
                "model": state,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "progress": {"step": step},
                "rng": {},
            },
        )

    def restore(self, saved: dict[str, Any]) -> int:
        """Goes on from a checkpoint: the number of complete steps."""
        self.net.load_state_dict(saved["model"]["net"])
        self.averaged.load_state_dict(saved["model"]["averaged"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.saved_step = self.begun = int(saved["progress"]["step"])
        return self.begun

    def non_finite(self, what: str, step: int) -> NonFiniteLossError:
        return NonFiniteLossError(what, self.lr, step, self.saved_step, self.begun)

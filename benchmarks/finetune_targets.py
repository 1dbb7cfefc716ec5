# SPDX-License-Identifier: Apache-2.0
"""Measures fine-tuning and ``fastdense train``: ``python -m benchmarks.finetune_targets --json FILE``.

Pictures are cut from photographs of scikit-image; the file of weights has torchvision's names. Six parts; ``--part``
chooses.

* curve: DenseNet-121 from the file, in plain torchvision and converted, 64 x 64, 12 steps of 8 images, for three seeds:
  the largest difference of the two curves of the loss, over the spread of the plain ones between seeds.
* step: a training step with SGD, 8 images of 224 x 224, in turns; equal losses first.
* memory: the same with two workers: most of the summed PSS of all processes, above that with the model loaded, in MiB.
* epoch: 64 JPEGs of 500 x 400, crops of 224, batch 8, two workers: an epoch, over its steps alone and loading alone.
* many: ``fastdense train`` on 100,000 JPEGs of 32 x 32: summed PSS above that of the model, seconds to the first step.
* kills: a run with workers, killed at 20 random moments and resumed: 0 where the final weights are the same bits.

``--quick`` takes smaller sizes, to see that the script works.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import psutil
import torch
import torchvision
import tqdm
from PIL import Image
from torch import Tensor, nn

import fastdense
from benchmarks.turns import Row, check_equal, parser_of, report, row_of_times, row_of_values
from fastdense.bench.memory import RETURN_FREED_MEMORY
from fastdense.bench.photographs import scikit_image_folder
from fastdense.train import TrainConfig, train
from fastdense.train.data import load_folder
from fastdense.train.processes import Processes
from fastdense.train.samples import Batches, Samples

VARIANTS = ("plain", "plain-channels-last", "fastdense")
PHOTOGRAPHS = ("chelsea.png", "coffee.png")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: steps and seeds of a curve, side and batch of a step, JPEGs of an epoch and of a folder."""

    steps: int = 12
    seeds: int = 3
    small: int = 64
    side: int = 224
    batch: int = 8
    pictures: int = 64
    many: int = 100_000
    kills: int = 20


QUICK = Sizes(2, 2, 64, 64, 4, 12, 400, 3)


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a fresh process, which may start workers, and returns freed memory."""
    os.environ.update(RETURN_FREED_MEMORY)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, initializer=_fork_workers) as pool:
        return pool.submit(function, *arguments).result()


def _fork_workers() -> None:
    """Workers begin as those of a script: a spawned process would spawn them, too."""
    multiprocessing.set_start_method("fork", force=True)


def cut_pictures(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """A folder with two classes of JPEGs, from two photographs."""
    choose = numpy.random.default_rng(0)
    for name in PHOTOGRAPHS:
        with Image.open(scikit_image_folder("benchmark") / name) as photograph:
            source = photograph.convert("RGB")
        (folder / name[:-4]).mkdir(parents=True)
        for at in range(count // 2):
            width, height = (int(choose.integers(side // 2, side)) for side in source.size)
            left, top = (int(choose.integers(s - t)) for s, t in zip(source.size, (width, height), strict=True))
            piece = source.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
            piece.save(folder / name[:-4] / f"{at}.jpg", quality=90)
    return folder


def weights_file(folder: Path) -> Path:
    """A DenseNet-121 as torchvision saves it."""
    torch.manual_seed(0)
    path = folder / "densenet121.pth"
    torch.save(torchvision.models.densenet121().state_dict(), path)
    return path


def make(file: Path, variant: str, seed: int = 0) -> nn.Module:
    """A network of two classes from the file; its last layer follows the seed."""
    torch.manual_seed(seed)
    net = torchvision.models.densenet121()
    net.load_state_dict(torch.load(file, weights_only=True))
    net.classifier = nn.Linear(net.classifier.in_features, 2)
    if variant == "fastdense":
        fastdense.convert(net)
    return net.to(memory_format=torch.channels_last) if variant == "plain-channels-last" else net


class Trainer:
    """A network, its optimizer and a step."""

    def __init__(self, net: nn.Module, lr: float = 0.01) -> None:
        self.net = net.train()
        self.optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, nesterov=True)

    def step(self, images: Tensor, labels: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.net(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def batches_of(folder: Path, size: int, batch: int, workers: int, seed: int = 0) -> Batches:
    return Batches(Samples(load_folder(folder, size), "crop", seed), batch, workers, Processes(torch.device("cpu")))


def normalised(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.45) / 0.225


def curve(file: Path, folder: Path, sizes: Sizes) -> Row:
    curves: dict[str, list[list[float]]] = {"plain": [], "fastdense": []}
    for seed in range(sizes.seeds):
        for variant, made in curves.items():
            trainer = Trainer(make(file, variant, seed))
            losses: list[float] = []
            for epoch in range(sizes.steps):
                read = batches_of(folder, sizes.small, sizes.batch, 0, seed).train(epoch, 0)
                for images, labels in read:
                    if len(losses) < sizes.steps:
                        losses.append(trainer.step(normalised(images), labels))
                if len(losses) == sizes.steps:
                    break
            made.append(losses)
    apart = numpy.abs(numpy.array(curves["plain"]) - numpy.array(curves["fastdense"])).max()
    spread = numpy.array(curves["plain"]).std(0, ddof=1).mean()
    values = {"last loss, plain": statistics.mean(c[-1] for c in curves["plain"])}
    values |= {"last loss, fastdense": statistics.mean(c[-1] for c in curves["fastdense"])}
    values |= {"1e3 x spread between seeds": 1e3 * spread, "1e3 x difference": 1e3 * apart}
    what = f"curve of {sizes.steps} steps, {sizes.seeds} seeds"
    return {"what": what, "values": values, "ratios": {"1e3 x difference": apart / spread}, "curves": curves}


def step_times(file: Path, sizes: Sizes, rounds: int) -> Row:
    images, labels = torch.rand(sizes.batch, 3, sizes.side, sizes.side), torch.arange(sizes.batch) % 2
    runs: dict[str, Callable[[], float]] = {}
    first: dict[str, float] = {}
    for variant in VARIANTS:
        layout = torch.channels_last if variant == "plain-channels-last" else torch.contiguous_format
        trainer, given = Trainer(make(file, variant), 1e-4), images.contiguous(memory_format=layout)
        runs[variant] = lambda t=trainer, x=given: t.step(x, labels)
        first[variant] = runs[variant]()
        check_equal(f"step {variant}", first["plain"], first[variant], 1e-3)
    return row_of_times(f"step, {sizes.batch} x {sizes.side} x {sizes.side}, ms", runs, rounds)


def _pss() -> float:
    """MiB of this process and its children; what several share is divided among them."""
    kibibytes = 0
    here = psutil.Process()
    for process in [here, *here.children(recursive=True)]:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            kibibytes += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kibibytes / 1024


@contextlib.contextmanager
def sampled(seen: list[float]) -> Iterator[None]:
    """Appends the summed PSS, again and again, while the body runs."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            seen.append(_pss())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _training_peak(file: Path, folder: Path, variant: str, sizes: Sizes, steps: int) -> tuple[float, float]:
    """MiB above the loaded model with workers that read, and the last loss."""
    trainer = Trainer(make(file, variant), 1e-4)
    batches = batches_of(folder, sizes.side, sizes.batch, 2)
    layout = torch.channels_last if variant == "plain-channels-last" else torch.contiguous_format
    before, seen, loss = _pss(), [], 0.0
    with sampled(seen):
        for _, (images, labels) in zip(range(steps), batches.train(0, 0), strict=False):
            loss = trainer.step(normalised(images).contiguous(memory_format=layout), labels)
    return max(seen, default=before) - before, loss


def memory(file: Path, folder: Path, sizes: Sizes) -> Row:
    peaks, losses = {}, {}
    for variant in VARIANTS:
        peaks[variant], losses[variant] = alone(_training_peak, file, folder, variant, sizes, 3)
        check_equal(f"memory {variant}", losses["plain"], losses[variant], 1e-2)
    return row_of_values(f"memory, {sizes.batch} x {sizes.side} x {sizes.side}, 2 workers, MiB", peaks)


def _epoch(file: Path, folder: Path, sizes: Sizes) -> dict[str, float]:
    """Seconds of an epoch, of its steps alone, and of loading alone."""
    trainer = Trainer(make(file, "fastdense"), 1e-4)
    batches = batches_of(folder, sizes.side, sizes.batch, 2)
    held = [(normalised(images), labels) for images, labels in batches.train(0, 0)]  # workers have begun
    trainer.step(*held[0])
    taken = {}
    start = time.perf_counter()
    for images, labels in batches.train(1, 0):
        trainer.step(normalised(images), labels)
    taken["epoch"] = time.perf_counter() - start
    start = time.perf_counter()
    for images, labels in held:
        trainer.step(images, labels)
    taken["steps alone"] = time.perf_counter() - start
    start = time.perf_counter()
    for _ in batches.train(2, 0):
        pass
    taken["loading alone"] = time.perf_counter() - start
    return taken


def epoch(file: Path, folder: Path, sizes: Sizes) -> Row:
    taken = alone(_epoch, file, folder, sizes)
    ratio = taken["epoch"] / (taken["steps alone"] + taken["loading alone"])
    return {"what": f"epoch of {sizes.pictures} JPEGs of 500 x 400, s", "values": taken, "ratios": {"epoch": ratio}}


def many_pictures(folder: Path, count: int) -> Path:
    """So many files of a few hundred different JPEGs."""
    draw = numpy.random.default_rng(0)
    contents = []
    for _ in range(500):
        content = io.BytesIO()
        small = draw.integers(0, 256, (4, 4, 3), dtype=numpy.uint8)
        Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(content, "JPEG", quality=80)
        contents.append(content.getvalue())
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for at in tqdm.tqdm(range(count // 2), f"pictures of {name}", leave=False):
            (folder / name / f"{at}.jpg").write_bytes(contents[at % len(contents)])
    return folder


def _first_steps(folder: Path, out: Path) -> tuple[float, float]:
    """MiB above the model, and seconds until the first step is done; the run goes on for some seconds more."""
    fields: dict[str, Any] = {"model_kwargs": {"depth": 10, "growth_rate": 4}, "epochs": 1, "batch": 64, "workers": 2}
    config = TrainConfig(data=str(folder), size=32, checkpoint_seconds=0.0, out=out, **fields)
    net = fastdense.models.densenet_cifar(10, growth_rate=4, num_classes=2)
    net(torch.rand(2, 3, 32, 32))
    before, start, first = _pss(), time.perf_counter(), []

    def stop_later() -> None:
        while not (out / "checkpoint.pt").exists():
            time.sleep(0.01)
        first.append(time.perf_counter() - start)
        time.sleep(5)
        os.kill(os.getpid(), signal.SIGINT)

    seen: list[float] = []
    stopper = threading.Thread(target=stop_later)
    stopper.start()
    with sampled(seen), contextlib.suppress(KeyboardInterrupt):
        train(config, progress=False)
        stopper.join()
    return max(seen) - before, first[0]


def many(place: Path, sizes: Sizes) -> Row:
    folder = many_pictures(place / "many", sizes.many)
    above, seconds = alone(_first_steps, folder, place / "out")
    values = {"MiB above the model": above, "s to the first step": seconds}
    return {"what": f"{sizes.many:,} JPEGs of 32 x 32, 2 workers", "values": values, "ratios": {}}


def _killed(config: TrainConfig, moments: list[float]) -> int:
    """Runs in forks that die by SIGKILL so many seconds after their start, then to the end; how often it had begun."""
    train(dataclasses.replace(config, out=config.out.with_name("warm"), epochs=1), progress=False)
    alive = 0
    for moment in moments:
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                train(config, progress=False)
            os._exit(0)
        time.sleep(moment)
        if os.waitpid(child, os.WNOHANG)[0] == 0:
            alive += 1
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    train(config, progress=False)
    return alive


def kills(folder: Path, place: Path, sizes: Sizes) -> Row:
    fields: dict[str, Any] = {"model_kwargs": {"depth": 10, "growth_rate": 4}, "batch": 2, "workers": 2, "size": 32}
    fields |= {"epochs": 2 * sizes.kills, "ema": 0.9, "resume": True, "threads": 1, "checkpoint_seconds": 0.0}
    config = TrainConfig(data=str(folder), out=place / "killed", **fields)
    choose = random.Random(0)
    moments = [choose.uniform(0.2, 2.0) for _ in range(sizes.kills)]
    alive = alone(_killed, config, moments)
    whole = dataclasses.replace(config, out=place / "whole", checkpoint_seconds=1e9)
    alone(train, whole, False)
    states = [torch.load(place / name / "checkpoint.pt", weights_only=True) for name in ("killed", "whole")]
    pairs = [(one, states[1][part][key]) for part in ("model", "averaged") for key, one in states[0][part].items()]
    values = {"kills while it ran": alive, "tensors that differ": sum(not torch.equal(*pair) for pair in pairs)}
    return {"what": f"{sizes.kills} kills", "values": values, "ratios": {}}


def main() -> None:
    parts = ("curve", "step", "memory", "epoch", "many", "kills")
    parser = parser_of(__doc__, 4)
    parser.add_argument("--part", choices=parts, nargs="+", default=parts, help="default: all")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        file, folder = weights_file(place), cut_pictures(place / "pictures", sizes.pictures * 5 // 4, (500, 400))
        tiny = cut_pictures(place / "tiny", 20, (48, 40))
        made: dict[str, Callable[[], Row]] = {
            "curve": lambda: curve(file, folder, sizes),
            "step": lambda: step_times(file, sizes, options.rounds),
            "memory": lambda: memory(file, folder, sizes),
            "epoch": lambda: epoch(file, folder, sizes),
            "many": lambda: many(place, sizes),
            "kills": lambda: kills(tiny, place, sizes),
        }
        rows = []
        for part in options.part:
            start = time.perf_counter()
            rows.append(made[part]())
            print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
    report(rows, options.json, sizes=dataclasses.asdict(sizes))


if __name__ == "__main__":
    main()

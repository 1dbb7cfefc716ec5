# SPDX-License-Identifier: Apache-2.0
"""What a training run writes beside its checkpoint: a log, curves, metrics."""

from __future__ import annotations

import csv
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from fastdense._support import MissingExtraError, extra, write_atomically

Entry = dict[str, Any]


def describe(entry: Entry, epochs: int) -> str:
    """A line about an epoch."""
    waiting, limit = entry["waiting"], entry["limit"]
    return (
        f"epoch {entry['epoch']}/{epochs}: loss {entry['loss']:.4f}, accuracy {100 * entry['accuracy']:.2f} %, test"
        f" loss {entry['test_loss']:.4f}, test accuracy {100 * entry['test_accuracy']:.2f} %;"
        f" {entry['seconds']:.1f} s in steps, {waiting:.1f} s waiting for images: {limit} are the limit"
    )


def save_log(history: list[Entry], path: Path) -> None:
    """Writes a row an epoch as CSV."""
    text = StringIO(newline="")
    writer = csv.DictWriter(text, list(history[0]))
    writer.writeheader()
    writer.writerows(history)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def open_tensorboard(folder: Path, complete: int) -> Callable[[Entry], None]:
    """Returns what adds an epoch to a log for TensorBoard, in which `complete` epochs stay.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "train: expected tensorboard to be installed, got no such module; run: pip install tensorboard"
        ) from error
    writer = SummaryWriter(str(folder), purge_step=complete + 1)

    def add(entry: Entry) -> None:
        for name, value in entry.items():
            if isinstance(value, int | float) and name != "epoch":
                writer.add_scalar(name, value, entry["epoch"])
        writer.flush()

    return add


def save_curves(history: list[Entry], path: Path) -> None:
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

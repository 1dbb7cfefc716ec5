# SPDX-License-Identifier: Apache-2.0
"""Training runs of a tiny network, on a folder of tiny pictures."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdense.train import TrainConfig, train


def tiny(out: Path, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "model_kwargs": {"depth": 10, "growth_rate": 4},
        "augment": "shift",
        "epochs": 1,
        "batch": 8,
        "size": 8,
        "threads": 1,
        "workers": 0,
        "out": out,
    }
    return TrainConfig(**{**fields, **changes})


def paint(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    """A picture of one colour with noise."""
    noise = np.random.default_rng(seed).integers(-30, 31, (12, 14, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(path)


def red_and_blue(folder: Path) -> Path:
    """Two classes of twenty pictures."""
    for seed in range(20):
        paint(folder / "red" / f"{seed}.png", (200, 40, 40), seed)
        paint(folder / "blue" / f"{seed}.png", (40, 40, 200), 100 + seed)
    return folder


def finished(folder: Path) -> TrainConfig:
    """A finished run of two epochs with four steps each."""
    config = tiny(folder / "whole", data=str(red_and_blue(folder / "pictures")), epochs=2)
    train(config, progress=False)
    return config


def command(config: TrainConfig, *more: str) -> list[str]:
    """What to type for a run of :func:`tiny`."""
    names = ("data", "augment", "batch", "size", "threads", "workers", "out")
    fields = {**{name: getattr(config, name) for name in names}, **config.model_kwargs}
    return ["train", *[f"--{name.replace('_', '-')}={value}" for name, value in fields.items()], *more]


def fastdense_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastdense:")]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what depends on the clock."""
    return [{**entry, "seconds": 0, "waiting": 0, "limit": ""} for entry in history]


def assert_same_weights(first: Path, second: Path) -> None:
    """And the same averages of weights, bit for bit."""
    for name in ("model", "averaged"):
        expected, found = (torch.load(out / "checkpoint.pt", weights_only=True)[name] for out in (first, second))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the files that torchvision offers, from before 2018."""
    renamed = {re.sub(r"(denselayer\d+\.(norm|conv))([12])\.", r"\1.\3.", key): value for key, value in state.items()}
    return {key: value for key, value in renamed.items() if not key.endswith("num_batches_tracked")}

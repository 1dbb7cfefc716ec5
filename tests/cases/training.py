# SPDX-License-Identifier: Apache-2.0
"""Training runs of a tiny network."""

from pathlib import Path
from typing import Any

import torch

from fastdense.train import TrainConfig


def tiny(out: Path, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "model_kwargs": {"depth": 10, "growth_rate": 4},
        "epochs": 1,
        "batch": 8,
        "size": 8,
        "threads": 1,
        "out": out,
    }
    return TrainConfig(**{**fields, **changes})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def assert_same_weights(first: Path, second: Path) -> None:
    expected, found = weights(first), weights(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

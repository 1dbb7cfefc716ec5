# SPDX-License-Identifier: Apache-2.0
"""``fastdense models``."""

from __future__ import annotations

import argparse

import torch

from fastdense import models
from fastdense._support import extra
from fastdense.cli.bench import console, progress
from fastdense.models.catalogue import CATALOGUE, count_model


def run(options: argparse.Namespace) -> int:
    """Prints a table of all models."""
    with extra("cli"):
        from rich import box
        from rich.table import Table
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("model", no_wrap=True)
    for heading in ("parameters", "GMAC", "MiB plain", "MiB here", "image"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("paper", no_wrap=True)
    names = models.list()
    with progress("models", len(names)) as tick:
        for name in names:
            info = CATALOGUE[name]
            with torch.device("meta"):
                model = models.create(name, **info.kwargs)
            counts = count_model(model, info.shape)
            table.add_row(
                name,
                f"{counts.parameters:,}",
                f"{counts.macs / 1e9:.3f}",
                f"{counts.plain_bytes / 2**20:.1f}",
                f"{counts.kept_bytes / 2**20:.1f}",
                "x".join(map(str, info.shape)),
                f"arXiv:{info.paper}, {info.year}" if info.paper else str(info.year),
            )
            tick(name)
    console().print(table)
    console().print("MiB: kept for the backward pass of one image in float32, by plain PyTorch and by fastdense.")
    return 0

# SPDX-License-Identifier: Apache-2.0
"""``fastdense models``."""

from __future__ import annotations

import argparse
import json
from importlib.resources import files

from fastdense.cli.arguments import Commands, add_command
from fastdense.cli.terminal import columns

HELP = """List the models with parameters, work, memory and paper.

examples:
  fastdense models
  fastdense models --json
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "models", HELP, run)
    parser.add_argument("--json", action="store_true", help="print JSON, with numbers as they are")


def run(options: argparse.Namespace) -> int:
    """Prints a table of all models, from the figures that `fastdense.models.catalogue` has counted."""
    text = files("fastdense").joinpath("models/catalogue.json").read_text()
    if options.json:
        print(text, end="")
        return 0
    rows = [("model", "parameters", "GMAC", "MiB plain", "MiB fastdense", "image", "paper")]
    for name, model in json.loads(text).items():
        paper = f"arXiv:{model['paper']}, {model['year']}" if model["paper"] else str(model["year"])
        rows.append(
            (
                name,
                f"{model['parameters']:,}",
                f"{model['macs'] / 1e9:.3f}",
                f"{model['plain_bytes'] / 2**20:.1f}",
                f"{model['kept_bytes'] / 2**20:.1f}",
                "x".join(map(str, model["shape"])),
                paper,
            )
        )
    print(columns(rows, right=range(1, 6)))
    print("\nGMAC: billions of multiply-adds for one image of that size.")
    print("MiB: saved for backward, one image in float32, by plain PyTorch and by fastdense.")
    return 0

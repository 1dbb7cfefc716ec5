# SPDX-License-Identifier: Apache-2.0
"""The commands; a module each, with ``add``, which adds its options, and ``run``."""

from __future__ import annotations

import argparse

from fastdense._build_info import version
from fastdense.cli import bench, demo, evaluate, export, info, models, plan, predict, resize, selftest, train, upscale

COMMANDS = (info, selftest, models, bench, plan, train, predict, export, resize, upscale, evaluate, demo)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``run``. Made without torch, so that help is quick."""
    parser = argparse.ArgumentParser(
        prog="fastdense",
        description="Densely connected networks in less memory and time.",
        epilog="fastdense COMMAND -h",
    )
    parser.add_argument("--version", action="version", version=f"fastdense {version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser

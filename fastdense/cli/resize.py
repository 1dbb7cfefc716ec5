# SPDX-License-Identifier: Apache-2.0
"""``fastdense resize``."""

from __future__ import annotations

import argparse
from typing import Any

from fastdense._choices import PRESET_NAMES
from fastdense._support import InputError
from fastdense.cli.arguments import FILES, Commands, add_command, add_pictures, width_and_height

HELP = f"""Resize pictures with a bicubic convention of your choice.

Resizes as a library does, bit for bit: torch, torch_antialias, pillow (13), pillow12, opencv or matlab. A folder is
resized with all its sub-folders.

{FILES}
examples:
  fastdense resize in.png out.png --scale 2 --preset matlab
  fastdense resize photographs/ small/ --scale 0.25 --preset pillow
  fastdense resize in.png out.png --size 640x480

Exit code 1 if a picture of a folder could not be resized; it is named, and the others are resized.
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "resize", HELP, run)
    add_pictures(parser, "premultiplied with pillow, else straight")
    parser.add_argument("--scale", type=float, metavar="S", help="2 doubles width and height")
    parser.add_argument("--size", type=width_and_height, metavar="WxH", help="instead of --scale")
    parser.add_argument("--preset", choices=PRESET_NAMES, default="torch_antialias", help="default: %(default)s")
    parser.add_argument(
        "--antialias",
        action=argparse.BooleanOptionalAction,
        help="widen the cubic when shrinking (default: the preset's)",
    )


def run(options: argparse.Namespace) -> int:
    """Resizes one picture or all pictures of a folder."""
    from fastdense.cli.images import Change, change_images
    from fastdense.sr.resize_samples import resize_samples, resized_size

    if (options.scale is None) == (options.size is None):
        raise InputError("resize: expected exactly one of --scale and --size to be given")
    size = (options.size[1], options.size[0]) if options.size else None
    change = Change(
        lambda samples: resized_size(samples, size, options.scale, options.preset),
        lambda samples: resize_samples(samples, size, options.scale, options.preset, options.antialias, options.alpha),
    )
    return change_images("resize", options, change)


def __getattr__(name: str) -> Any:
    """``resize_samples`` was here in version 0.1.0."""
    if name == "resize_samples":
        from fastdense.sr.resize_samples import resize_samples

        return resize_samples
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

# SPDX-License-Identifier: Apache-2.0
"""Pictures in a folder of their own, and what a file says of itself."""

from typing import Any

from PIL import Image

from fastdense.cli import main


def resize(read: str, write: str, *options: str) -> int:
    return main(["resize", read, write, "--scale", "1", *options])


def info(path: str) -> dict[Any, Any]:
    with Image.open(path) as picture:
        picture.load()
        return {**picture.info, "format": picture.format, "mode": picture.mode}

# SPDX-License-Identifier: Apache-2.0
"""Finding picture files, and where their results go."""

from __future__ import annotations

import collections
import dataclasses
import os
from pathlib import Path

from fastdense._support import InputError
from fastdense.sr.images.formats import SUFFIXES


@dataclasses.dataclass
class Found:
    """What lies below a folder.

    Attributes:
        pictures: files with a known ending, in sorted order.
        others: how many files there are with each other ending.
        failed: a line for each folder that cannot be read.
    """

    pictures: list[Path] = dataclasses.field(default_factory=list)
    others: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    failed: list[str] = dataclasses.field(default_factory=list)

    def left_out(self) -> str | None:
        """A sentence about the others, or None where there are none."""
        if not self.others:
            return None
        endings = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in sorted(self.others.items()))
        return f"left out {self.others.total()} other files ({endings})"


def search_folder(folder: Path, without: Path | None = None) -> Found:
    """Looks below a folder but for hidden files, links to folders, and the folder ``without``."""
    found = Found()

    def fail(error: OSError) -> None:
        found.failed.append(f"{error.filename}: {error.strerror}")

    outside = os.path.realpath(without) if without is not None else None
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if outside is not None:
            folders[:] = [name for name in folders if os.path.realpath(Path(parent) / name) != outside]
        for name in names:
            path = Path(parent) / name
            if name.startswith("."):
                continue
            if path.suffix.lower() in SUFFIXES and path.is_file():
                found.pictures.append(path)
            else:
                found.others[path.suffix.lower()] += 1
    found.pictures.sort()
    return found


def find_images(folder: Path) -> list[Path]:
    """Lists the picture files below `folder` in sorted order; hidden files are left out."""
    return search_folder(folder).pictures


def image_pairs(command: str, source: Path, target: Path, overwrite: bool) -> tuple[list[tuple[Path, Path]], Found]:
    """Which picture goes where: one file, or every picture below a folder; and what else lies there.

    Results that lie below the folder are no pictures to read.

    Raises:
        InputError: there is nothing to read, or a result would replace a picture that is read, without ``overwrite``;
            the message begins with ``command``.
    """
    if source.is_file():
        found = Found([source])
        pairs = [(source, target / source.name if target.is_dir() else target)]
    else:
        if not source.is_dir():
            raise InputError(f"{command}: expected IN to be a picture or a folder, got {source}")
        if target.is_file():
            raise InputError(f"{command}: expected OUT to be a folder like IN, got the file {target}")
        found = search_folder(source, None if os.path.realpath(target) == os.path.realpath(source) else target)
        if not found.pictures:
            known, why = ", ".join(sorted(SUFFIXES)), "; ".join(found.failed) or "none"
            raise InputError(f"{command}: expected IN to hold pictures ({known}), got {why} in {source}")
        pairs = [(path, target / path.relative_to(source)) for path in found.pictures]
    read = {os.path.realpath(path) for path, _ in pairs}  # which links in a circle do not stop
    same = [write for _, write in pairs if os.path.realpath(write) in read]
    if same and not overwrite:
        raise InputError(
            f"{command}: expected OUT to be other files than IN, got {same[0]}; give --overwrite to replace originals"
        )
    return pairs, found

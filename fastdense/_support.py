# SPDX-License-Identifier: Apache-2.0
"""What the command line, `fastdense.bench` and `fastdense.train` share: errors, extras, files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, and what to do."""


class MissingExtraError(ImportError):
    """A package of an optional dependency group is not installed."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, once what was done so far is kept. The message says what; the command line prints the next command.

    Attributes:
        resumes: whether the same command with ``--resume`` goes on from there.
        result: what there is of a result.
    """

    def __init__(self, message: str, *, resumes: bool, result: Any = None) -> None:
        super().__init__(message)
        self.resumes = resumes
        self.result = result


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Turns a failing import of an optional package into the command that installs it.

    Args:
        name: the dependency group of pyproject.toml that holds the package, e.g. ``"cli"``.

    Raises:
        MissingExtraError: a package imported inside the block is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        raise MissingExtraError(
            f"fastdense: expected {package} to be installed, got no such module; run: pip install 'fastdense[{name}]'"
        ) from error


def check_output(what: str, path: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Refuses a file that could not be written later, before any work is done.

    Args:
        what: beginning of the message, e.g. ``"bench: expected --json"``.
        path: the file; a missing folder is created.
        suffixes: the endings that are known, if not all are.

    Raises:
        InputError: the ending is unknown, or there is no folder to write to.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise InputError(f"{what} to end in {', '.join(suffixes)}, got {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            writable = not path.is_dir()
    except OSError:
        writable = False
    if not writable:
        raise InputError(f"{what} to be a file that can be written, got {path}")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that `path` holds the old content or the new, never a part of it.

    Args:
        path: the file to replace; its folder is created. A symbolic link stays, and what it points to is replaced.
        write: called with a binary file opened for writing.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, and short, since that of `path` may be as long as the system takes.
    temporary = path.with_name(f".fastdense-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut, where the system can (POSIX)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: object) -> None:
    """Writes `value` as strict JSON: NaN and infinities become null."""
    text = json.dumps(finite(value), indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def finite(value: object) -> object:
    """Copies a tree of dicts, lists and scalars with every non-finite float replaced by None."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

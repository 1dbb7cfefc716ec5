# SPDX-License-Identifier: Apache-2.0
"""What the command line, `fastdense.bench` and `fastdense.train` share: errors, extras, files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

# How the names of files end that are being written.
TEMPORARY = ".fastdense-tmp"


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
            f"fastdense: {package} is not installed; run: pip install 'fastdense[{name}]'"
        ) from error


def first_of(lines: Sequence[str], most: int = 3) -> str:
    """The end of a message that names what was left out: ``"; a; b; c; and 7 more"``."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"; {line}" for line in [*lines[:most], *more])


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
            writable = path.is_file() or not path.exists()
    except OSError:
        writable = False
    if not writable:
        raise InputError(f"{what} to be a file that can be written, got {path}")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that `path` holds the old content or the new, never a part of it.

    The new content goes to a new file of the same folder, which then takes the place of the old one and its
    permissions. A symbolic link at `path` stays; the file that it points to is replaced.

    Args:
        path: the file to replace; its folder is created.
        write: called with a binary file opened for writing.

    Raises:
        InputError: `path` is something else than a file, such as a folder or a device.
        OSError: the file cannot be written: no space, too large, no permission; its ``filename`` is `path`.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"expected {path} to be a file, got something else of that name")
    with _naming(path):
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{secrets.token_hex(8)}{TEMPORARY}")
        handle = _create(temporary, like=path)
        try:
            with open(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Lets the system's errors name `path`, also behind the RuntimeError that torch.save makes of them."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        failure = error if isinstance(error, OSError) else error.__cause__ or error.__context__
        if not isinstance(failure, OSError):
            raise
        raise OSError(failure.errno, failure.strerror or str(failure), str(path)) from error


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that died in :func:`write_atomically` left; no other may be writing to `folder`."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def _create(temporary: Path, like: Path) -> int:
    """Opens a file that did not exist, with the permissions of `like`, or those of any new file."""
    try:
        status = os.lstat(like)
        mode = stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else None
    except FileNotFoundError:
        mode = None
    # Never wider than the old file's, not even for a moment.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
    if mode is not None:
        os.chmod(temporary, mode)  # the umask may have taken some away
    return handle


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

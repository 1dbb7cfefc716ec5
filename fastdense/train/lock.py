# SPDX-License-Identifier: Apache-2.0
"""One run at a time in an output folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from fastdense._support import InputError, remove_leftovers

# Open lock files. The lock belongs to every process that has the file open, so forked workers, which may outlive a
# run that was killed, have to close it.
_held: set[int] = set()


def _close_in_child() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder; the system ends this when the process dies, however that happens.

    Half-written files of runs that were killed are removed.

    Args:
        folder: created if there is none.

    Raises:
        InputError: there can be no such folder, or another run is writing to it.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _open_locked(path)
    except BlockingIOError as error:
        owner = ""
        with contextlib.suppress(OSError):  # gone with its owner
            owner = path.read_text(errors="replace").strip()
        raise InputError(
            f"train: expected out to be a folder that no other run writes to, got {folder}, where"
            f" {owner or 'another process'} is training; wait for it, or choose another folder"
        ) from error
    except OSError as error:
        raise InputError(f"train: expected out to be a folder that can be written, got {folder}: {error}") from error
    try:
        with contextlib.suppress(OSError):  # a full disk, for instance; it is a word to the next one only
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        remove_leftovers(folder)
        yield
    finally:
        if handle in _held:  # else this is a forked child
            path.unlink(missing_ok=True)
            _held.remove(handle)
            os.close(handle)


def _open_locked(path: Path) -> int:
    """Opens and locks the file at `path`, which is a new one where its owner removed it meanwhile."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    _held.add(handle)
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)

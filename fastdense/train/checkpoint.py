# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or absent, and that know which configuration they belong to."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdense._support import InputError, write_atomically
from fastdense.models.weights.sources import CHECKPOINT

FORMAT = f"{CHECKPOINT}3"

_REMEDY = "delete it, or start anew with --fresh (resume off)"


def say_that_there_is_none(path: Path) -> None:
    """Tells who wants to resume that the run starts from the beginning."""
    print(f"fastdense: no checkpoint {path} to resume: the run starts from the beginning", file=sys.stderr)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint so that `path` holds the old one or the new one, whatever happens meanwhile.

    Args:
        path: the file to replace.
        state: ``config`` (the fingerprint) and whatever else; tensors and plain Python values only.
    """
    state = {"format": FORMAT, "digest": _digest(state), **state}
    write_atomically(path, lambda file: torch.save(state, file))


def load(path: Path, fingerprint: Mapping[str, Any], may_change: tuple[str, ...] = ()) -> dict[str, Any]:
    """Reads a checkpoint of the same configuration; nothing in the file is executed.

    Args:
        path: a file of :func:`save`.
        fingerprint: the configuration that wants to continue.
        may_change: entries of it that need not be the same.

    Raises:
        InputError: the file is no whole checkpoint, one that was edited, or one of another configuration.
    """
    with restoring(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
            raise ValueError("another file, or one of another version of fastdense")
        if state.pop("digest", None) != _digest(state):
            raise ValueError("one that was changed after it had been written")
    saved = state["config"]
    differing = [key for key in fingerprint if key not in may_change and saved.get(key) != fingerprint[key]]
    if differing:
        pairs = "; ".join(f"{key} was {saved.get(key)!r} and is {fingerprint[key]!r}" for key in differing)
        raise InputError(
            f"train: expected {path} to be of the same configuration, got a difference: {pairs};"
            " resume with the old values, choose another folder, or start anew with --fresh"
        )
    return state


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Names the file in whatever goes wrong while it is read and put to use."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage sizes, shapes ...
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"train: expected {path} to be a whole checkpoint, got {reason}; {_REMEDY}") from error


def _digest(value: Any) -> str:
    """Of a tree of dicts, lists, tensors and plain values: other contents, another digest."""
    digest = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            digest.update(f"dict {len(value)}\n".encode())
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, list | tuple):
            digest.update(f"list {len(value)}\n".encode())
            for item in value:
                add(item)
        elif isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif value is None or isinstance(value, bool | int | float | str):
            digest.update(f"{type(value).__name__} {value!r}\n".encode())
        else:
            raise TypeError(f"a value of type {type(value).__name__}")

    add(value)
    return digest.hexdigest()

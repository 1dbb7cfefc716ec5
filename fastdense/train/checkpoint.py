# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or absent, and that know which configuration they belong to."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from fastdense._support import InputError, write_atomically

FORMAT = "fastdense-checkpoint-2"

_KEYS = frozenset(["format", "config", "model", "optimizer", "scaler", "progress", "rng"])


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint so that `path` holds the old one or the new one, whatever happens meanwhile.

    Args:
        path: the file to replace.
        state: ``config`` (the fingerprint), ``model``, ``optimizer``, ``scaler``, ``progress`` and ``rng``; tensors
            and plain Python values only.
    """
    state = {"format": FORMAT, **state}
    write_atomically(path, lambda file: torch.save(state, file))


def load(path: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Reads a checkpoint of the same configuration; nothing in the file is executed.

    Args:
        path: a file of :func:`save`.
        fingerprint: the configuration that wants to continue.

    Raises:
        InputError: the file is no whole checkpoint, or one of another configuration.
    """
    remedy = "delete it, or start anew with --fresh (resume off)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage sizes ...
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"train: expected {path} to be a whole checkpoint, got: {reason}; {remedy}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= _KEYS:
        raise InputError(f"train: expected {path} to be a checkpoint of fastdense, got another file; {remedy}")
    saved = state["config"]
    differing = [key for key in fingerprint if saved.get(key) != fingerprint[key]]
    if differing:
        pairs = "; ".join(f"{key} was {saved.get(key)!r} and is {fingerprint[key]!r}" for key in differing)
        raise InputError(
            f"train: expected {path} to be of the same configuration, got a difference: {pairs};"
            " resume with the old values, choose another folder, or start anew with --fresh"
        )
    return state

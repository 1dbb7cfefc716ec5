# SPDX-License-Identifier: Apache-2.0
"""Reads the entries of weight files. No code in a file is executed, and what a file claims is checked first."""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdense._support import extra

State = dict[str, Tensor]

# Where training programs put the entries, best first: averaged weights before the last ones.
_WRAPPERS = (
    "params_ema",
    "params-ema",
    "ema",
    "params",
    "model_state_dict",
    "state_dict",
    "model",
    "net",
    "network",
    "generator",
    "g",
    "weights",
)
# What wrappers of modules put in front of names; "model.0" is a name of ESRGAN's own.
_PREFIXES = re.compile(r"^(module|_orig_mod|generator|netG|model(?!\.\d))\.")
# mmagic keeps the averaged generator beside the other, and a counter.
_AVERAGED = "generator_ema."
_COUNTERS = ("step_counter",)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.bool)  # tables of other networks


def read_entries(op: str, path: Path) -> dict[str, Any]:
    """What a file of ``torch.save`` or of safetensors holds, on the CPU.

    Raises:
        ValueError: no such file, or not one of tensors by name; the message begins with ``op``.
        MissingExtraError: safetensors is not installed.
    """
    if not path.is_file():
        raise ValueError(f"{op}: expected path to be a file, got {path}")
    try:
        if path.suffix.lower() == ".safetensors":
            with extra("hub"):
                from safetensors.torch import load_file
            content: Any = load_file(path)
        else:
            content = _load(path)
    except ImportError:
        raise
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage sizes ...
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        # torch's own words are about an argument of torch.load, and the interpreter of pickles has none
        if isinstance(error, pickle.UnpicklingError | LookupError | EOFError):
            reason = "another file, or one with more than tensors in it; save the state_dict() of the network"
        raise ValueError(f"{op}: expected {path} to be a whole checkpoint of tensors, got {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{op}: expected {path} to hold entries by name, got a {type(content).__name__}")
    return dict(content)


def _load(path: Path) -> Any:
    is_archive = zipfile.is_zipfile(path)
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed entries, expected them stored as torch.save does it")
        claimed = sum(entry.file_size for entry in entries)
        if claimed > path.stat().st_size:
            raise ValueError(f"entries of {claimed:,} bytes in a file of {path.stat().st_size:,}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Mapped: what an archive claims takes no memory before it is checked. timm's training script adds its options.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)


def unwrap(op: str, path: Path, content: Mapping[str, Any]) -> State:
    """The entries of the network by their own names, out of what training programs and wrappers put around them.

    Raises:
        ValueError: an entry that is no tensor, or no plain one of finite numbers that the file holds.
    """
    while wrapper := next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None):
        content = content[wrapper]
    if any(isinstance(key, str) and key.startswith(_AVERAGED) for key in content):
        content = {key: value for key, value in content.items() if str(key).startswith(_AVERAGED)}
    state: State = {}
    for key, value in content.items():
        if key in _COUNTERS:
            continue
        if not isinstance(value, Tensor) or not isinstance(key, str):
            raise ValueError(f"{op}: expected {path} to hold tensors only, got {key} of type {type(value).__name__}")
        check_plain(op, path, key, value)
        key = key.removeprefix(_AVERAGED)
        while _PREFIXES.match(key):
            key = key.partition(".")[2]
        state[key] = value.detach()
    return state


def check_floats(op: str, path: Path, state: State) -> None:
    """Raises:
    ValueError: an entry of integers.
    """
    for key, value in state.items():
        if value.dtype not in _FLOATS:
            raise ValueError(f"{op}: expected {key} of {path} to be floating point, got {value.dtype}")


def check_plain(op: str, path: Path, key: str, value: Tensor) -> None:
    """Raises:
    ValueError: an entry that is no plain tensor of finite numbers that the file holds.
    """
    problem = _problem(value)
    if problem:
        raise ValueError(f"{op}: expected {key} of {path} to be {problem}")


def _problem(value: Tensor) -> str | None:
    """What a tensor should be and is not; its numbers are looked at last."""
    if value.is_meta:
        return "stored in the file, got a tensor without its numbers (meta)"
    if value.layout != torch.strided or value.is_quantized:
        return f"a plain tensor, got {'a quantised one' if value.is_quantized else value.layout}"
    if value.dtype not in _FLOATS + _INTEGERS:
        return f"floating point, got {value.dtype}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"stored whole, got shape {tuple(value.shape)} of {value.untyped_storage().nbytes():,} bytes"
    if not value.isfinite().all():
        return "finite, got NaN or infinity"
    return None

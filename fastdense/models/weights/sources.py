# SPDX-License-Identifier: Apache-2.0
"""Where weights come from: torchvision's addresses, timm, or a file. Nothing in a file is executed."""

import os
import warnings
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdense._support import InputError, extra
from fastdense.models.key_mapping import torchvision_keys
from fastdense.models.sr.weight_files import check_plain, read_entries
from fastdense.models.weights.loading import THRESHOLDS, load_state
from fastdense.models.weights.published import PublishedWeights

# A published set, its name, a name of timm with "timm/" in front, or a file.
WeightsLike = PublishedWeights | str | os.PathLike[str]

# How checkpoints of fastdense train begin; the number is that of the format.
CHECKPOINT = "fastdense-checkpoint-"
# What files call the entries of a network, where there are others beside them; averages first.
_WRAPPERS = ("state_dict_ema", "state_dict", "model_state_dict", "model")
# Of DistributedDataParallel, torch.compile, Lightning.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_TIMM = "timm/"


class Source(NamedTuple):
    """Entries by torchvision's names, and what messages call the place where they come from."""

    name: str
    state: dict[str, Tensor]

    def sizes(self, first: str, last: str) -> dict[str, int]:
        """``image_channels`` and ``num_classes`` of the entries, as far as they tell.

        Args:
            first: name of the first convolution.
            last: name of the last layer.
        """
        weights = {"image_channels": (f"{first}.weight", 1), "num_classes": (f"{last}.weight", 0)}
        return {
            size: self.state[key].shape[dim]
            for size, (key, dim) in weights.items()
            if key in self.state and self.state[key].dim() > dim
        }

    def load(self, op: str, model: nn.Module) -> None:
        """Loads the entries, see :func:`load_state`; warns of what was adapted."""
        for word in load_state(op, model, self.state, self.name):
            warnings.warn(f"fastdense: {op}: {word}", stacklevel=4)


def find_weights(
    op: str, weights: WeightsLike | None, published: type[PublishedWeights] | None, progress: bool = True
) -> Source | None:
    """The weights that a caller names; None for none.

    Args:
        op: name of the model, what messages begin with.
        weights: see :data:`WeightsLike`; torchvision's own enumerations count as well.
        published: what torchvision has for this model, if anything.
        progress: whether to show a download.

    Raises:
        InputError: there are no such weights, or they cannot be read; the message says what can be given.
        MissingExtraError: timm is not installed, for a name of timm.
    """
    if weights is None:
        return None
    known = dict(published.__members__) if published else {}
    if isinstance(weights, Enum):
        wanted = type(weights).__name__, weights.name
        if published is None or wanted[0] != published.__name__:
            expected = published.__name__ if published else "a file, there are none of torchvision"
            raise InputError(f"{op}: expected weights to be of {expected}, got {'.'.join(wanted)}")
        return _download(op, known[wanted[1]], progress)
    if isinstance(weights, str):
        name = weights.removeprefix(f"{published.__name__}.") if published else weights
        if name in known:
            return _download(op, known[name], progress)
        if weights.startswith(_TIMM):
            return _from_timm(op, weights)
    elif not isinstance(weights, os.PathLike):
        raise InputError(f"{op}: expected weights to be a name or a file, got {type(weights).__name__}")
    path = Path(weights)
    if not path.exists():
        choices = [*known, f"{_TIMM}NAME of timm", "a file"]
        raise InputError(f"{op}: expected weights to be {', '.join(choices[:-1])} or {choices[-1]}, got {str(path)!r}")
    return Source(str(path), read_weights(op, path))


def read_weights(op: str, path: Path) -> dict[str, Tensor]:
    """The entries of a classifier's file, by torchvision's names where these are DenseNets.

    Reads a ``state_dict`` (.pt, .pth, .safetensors ...) of torchvision, timm, MONAI or torchxrayvision, checkpoints
    of :func:`fastdense.train.train`, Lightning and timm's training script, of which averages come first.

    Args:
        op: what messages begin with.
        path: of the file.

    Raises:
        InputError: no such file, or no weights in it.
        MissingExtraError: safetensors is not installed.
    """
    if not path.is_file():
        hint = "; a folder of save_pretrained is read by fastdense.models.from_pretrained" if path.is_dir() else ""
        raise InputError(f"{op}: expected weights to be a file, got {path}{hint}")
    try:
        content: Any = read_entries(op, path)
    except ImportError:
        raise
    except ValueError as error:
        reason = str(error)
        if "Unsupported global" in str(error.__cause__):
            reason = (
                f"{op}: expected {path} to hold tensors alone, got other objects, such as a whole model; where you "
                "trust the file, save torch.load(path, weights_only=False).state_dict() and give that"
            )
        raise InputError(reason) from error
    if str(content.get("format")).startswith(CHECKPOINT):
        content = content.get("averaged") or content.get("model")
    while wrapper := next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None):
        content = content[wrapper]
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{op}: expected {path} to be a file of tensors by name, got other entries")
    state = {str(key): value for key, value in content.items()}
    while prefix := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    try:
        for key, value in state.items():
            if key != THRESHOLDS:  # NaN where there is none
                check_plain(op, path, key, value)
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        return torchvision_keys(state)
    except ValueError as error:
        raise InputError(f"{op}: expected {path} to be weights of one network: {error}") from error


def _download(op: str, weights: PublishedWeights, progress: bool) -> Source:
    name = f"{type(weights).__name__}.{weights.name}"
    try:
        state = weights.get_state_dict(progress)
    except Exception as error:  # no network, no such file, a wrong hash, a file that was cut off ...
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{op}: cannot load {name}: {reason}; fetch {weights.url} by other means and give the file as weights"
        ) from error
    return Source(name, torchvision_keys(state))


def _from_timm(op: str, weights: str) -> Source:
    """Weights that timm downloads, or has in its cache."""
    with extra("train"):
        import timm
    name = weights.removeprefix(_TIMM)
    if name.partition(".")[0] != op or not timm.models.is_model_pretrained(name):
        known = [f"{_TIMM}{one}" for one in timm.list_pretrained(f"{op}.*")]
        expected = f"one of {', '.join(known)}" if known else "a file, timm has none for it"
        raise InputError(f"{op}: expected weights to be {expected}, got {weights!r}")
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # no network, no space, a damaged cache ...
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{op}: cannot load {weights}: {reason}; timm fetches it from the Hugging Face hub: try again with a"
            " network, or give a file as weights"
        ) from error
    return Source(weights, torchvision_keys(model.state_dict()))

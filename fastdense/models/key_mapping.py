# SPDX-License-Identifier: Apache-2.0
"""Key mappings: renames DenseNet checkpoints of other libraries to torchvision's names."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

# Names of other libraries, and the names of torchvision that replace them.
_RULES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^module\.", ""),  # DataParallel
        (r"^_orig_mod\.", ""),  # torch.compile
        (r"(denselayer\d+)\.layers\.", r"\1."),  # MONAI
        (r"(denselayer\d+)\.(norm|relu|conv)\.([12])\.", r"\1.\2\3."),  # torchvision before 2018
        (r"^features\.norm_final\.", "features.norm5."),  # gpleiss/efficient_densenet_pytorch
        (r"^class_layers\.out\.", "classifier."),  # MONAI
    )
)


def torchvision_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the entries of a DenseNet's checkpoint to torchvision's names.

    Knows torchvision's names of today and of before 2018 (``norm.1``), timm's, MONAI's (``denselayer1.layers.norm1``,
    ``class_layers.out``), those of the memory-efficient reference implementation (``norm_final``), and the prefixes of
    DataParallel and torch.compile.

    Args:
        state_dict: of the whole model.

    Returns:
        The same tensors by other names, in the same order.

    Raises:
        ValueError: if two entries would get the same name.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = key
        for pattern, replacement in _RULES:
            name = pattern.sub(replacement, name)
        if name in renamed:
            raise ValueError(f"torchvision_keys: expected one entry for {name}, got a second one: {key}")
        renamed[name] = value
    return renamed


def load_densenet(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Loads a DenseNet checkpoint of any known library into a model with torchvision's names.

    Args:
        model: of :mod:`fastdense.models`, torchvision or timm; left as it was if the checkpoint does not fit.
        state_dict: see :func:`torchvision_keys`; numbers of batches may be missing, as in old checkpoints.

    Raises:
        ValueError: if an entry is missing, unknown or of another shape; the message names it.
    """
    renamed = torchvision_keys(state_dict)
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            renamed.setdefault(key, value)
    load_exactly("load_densenet", model, renamed)


def load_exactly(op: str, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Loads entries that must be those of ``model``, no more and no less, and of the same shapes.

    Raises:
        ValueError: if an entry is missing, unknown or of another shape; the message names it, nothing was changed.
    """
    wanted = model.state_dict()
    for key, value in wanted.items():
        if key not in state_dict:
            raise ValueError(f"{op}: expected state_dict to have {key}, but it is missing")
        if state_dict[key].shape != value.shape:
            raise ValueError(
                f"{op}: expected {key} to have shape {tuple(value.shape)}, got {tuple(state_dict[key].shape)}"
            )
    unknown = [key for key in state_dict if key not in wanted]
    if unknown:
        raise ValueError(f"{op}: expected only entries of the model, got unknown {unknown[0]}")
    model.load_state_dict(state_dict)

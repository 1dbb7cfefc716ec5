# SPDX-License-Identifier: Apache-2.0
"""Loads entries into a network that may have other classes or input channels than they were made for."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from fastdense._support import InputError
from fastdense.models.key_mapping import load_exactly, torchvision_keys

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Of torchxrayvision: thresholds that scale its outputs behind the network.
THRESHOLDS = "op_threshs"
_LAYER = re.compile(r"denseblock(\d+)\.denselayer(\d+)\.")


def last_layer(model: nn.Module) -> list[str]:
    """The name of the layer that makes the scores of the classes, and that of a norm behind it where there is one."""
    named = list(model.named_modules())
    last = max(at for at, (_, module) in enumerate(named) if isinstance(module, nn.Linear | nn.Conv2d))
    return [name for name, module in named[last:] if any(True for _ in module.parameters())]


def first_convolution(model: nn.Module) -> str | None:
    """The name of the convolution that reads the input, if one does."""
    return next((name for name, module in model.named_modules() if isinstance(module, _CONVOLUTIONS)), None)


def load_state(op: str, model: nn.Module, state_dict: Mapping[str, Tensor], source: object) -> list[str]:
    """Loads entries of any library that :func:`torchvision_keys` knows.

    A last layer for another number of classes, or none, leaves that of ``model`` as it is. A first convolution for
    another number of input channels is adapted as timm does it: summed for one channel, else repeated and scaled so
    that the sum over the channels stays.

    Args:
        op: what messages begin with.
        model: gets the weights; its dtype stays.
        state_dict: of the whole network, or without its last layer; numbers of batches may be missing.
        source: where the entries come from, for messages.

    Returns:
        A line for each adaptation that says so.

    Raises:
        InputError: an entry is missing, unknown or of another shape; nothing was changed.
    """
    own, layers = model.state_dict(), last_layer(model)
    words = []
    try:
        state = torchvision_keys(state_dict)
        if THRESHOLDS in state and THRESHOLDS not in own:
            del state[THRESHOLDS]
            words.append(f"{THRESHOLDS} of {source} is left out: the network gives logits")
        word = _keep_last_layer(state, own, layers, source)
        words += [word] if word else []
        word = _adapt_first(state, own, first_convolution(model), source)
        words += [word] if word else []
        state |= {key: value for key, value in own.items() if key.endswith("num_batches_tracked") and key not in state}
        load_exactly(f"{source}", model, state)
    except ValueError as error:
        raise InputError(
            f"{op}: expected weights of this model, got another's: {error}{_describe_blocks(state_dict)}"
        ) from error
    return words


def _keep_last_layer(
    state: dict[str, Tensor], own: Mapping[str, Tensor], layers: list[str], source: object
) -> str | None:
    """Replaces entries of another last layer by the network's own."""
    head, prefixes = f"{layers[0]}.weight", tuple(f"{layer}." for layer in layers)
    given, wanted = state.get(head), own[head]
    if given is not None and given.shape[:1] == wanted.shape[:1]:
        return None
    for key in [key for key in state if key.startswith(prefixes)]:
        del state[key]
    state |= {key: value for key, value in own.items() if key.startswith(prefixes)}
    has = "none" if given is None else f"one for {len(given)}"
    return f"{layers[0]} is a new layer for {len(wanted)} classes: {source} has {has}"


def _adapt_first(state: dict[str, Tensor], own: Mapping[str, Tensor], name: str | None, source: object) -> str | None:
    """Adapts the first convolution to the network's input channels, if these alone differ."""
    key = f"{name}.weight"
    given, wanted = state.get(key), own.get(key)
    if given is None or wanted is None or given.dim() != wanted.dim() or given.shape == wanted.shape:
        return None
    (channels, before), after = given.shape[:2], wanted.shape[1]
    if channels != wanted.shape[0] or given.shape[2:] != wanted.shape[2:]:
        return None
    weight = given.float()  # sums of 16-bit weights are rounded once
    if after == 1:
        weight = weight.sum(1, keepdim=True)
    else:
        repeats = [1, -(-after // before), *[1] * (weight.dim() - 2)]
        weight = weight.repeat(repeats)[:, :after] * (before / after)
    state[key] = weight.to(given.dtype)
    return f"{name} is adapted to {after} input channels: {source} has {before}"


def _describe_blocks(state_dict: Mapping[str, Tensor]) -> str:
    """The layers of the dense blocks that there are, which tell the DenseNets apart."""
    layers: dict[int, int] = {}
    for key in state_dict:
        if found := _LAYER.search(key):
            block, layer = int(found[1]), int(found[2])
            layers[block] = max(layer, layers.get(block, 0))
    if not layers:
        return ""
    return f"; its dense blocks have {', '.join(str(layers[block]) for block in sorted(layers))} layers"

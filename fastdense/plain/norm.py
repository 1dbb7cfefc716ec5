# SPDX-License-Identifier: Apache-2.0
"""Norms by name."""

from collections.abc import Callable, Mapping
from math import gcd
from typing import Any

from torch import nn

from fastdense.plain.arguments import name_and_arguments

# A name, or a name and the arguments of its class, as MONAI writes it.
NormName = str | tuple[str, Mapping[str, Any]]

_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def _group(channels: int, num_groups: int | None = None, **arguments: Any) -> nn.Module:
    return nn.GroupNorm(gcd(channels, 32) if num_groups is None else num_groups, channels, **arguments)


def make_norm(op: str, norm: NormName, channels: int, spatial_dims: int, **of_batch_norm: Any) -> nn.Module:
    """The module of :mod:`torch.nn` with a name: "batch", "instance" or "group".

    Args:
        op: what errors begin with.
        norm: the name, or the name and arguments, such as ``("group", {"num_groups": 8})``; a group norm without has
            ``gcd(channels, 32)`` groups.
        channels: of the norm.
        spatial_dims: 1, 2 or 3.
        of_batch_norm: arguments of a batch norm; of these, other norms have ``eps`` alone.

    Raises:
        ValueError: unknown names, arguments that the class does not take, groups that do not divide the channels.
    """
    name, given = name_and_arguments(op, "norm", norm)
    kinds: dict[str, Callable[..., nn.Module]] = {
        "batch": _BATCH[spatial_dims - 1],
        "instance": _INSTANCE[spatial_dims - 1],
        "group": _group,
    }
    lower = name.lower()
    if lower not in kinds:
        raise ValueError(f"{op}: expected norm to be one of {', '.join(kinds)}, got {name!r}")
    arguments = of_batch_norm if lower == "batch" else {k: v for k, v in of_batch_norm.items() if k == "eps"}
    try:
        return kinds[lower](channels, **{**arguments, **given})
    except TypeError as error:
        raise ValueError(f"{op}: expected norm to have arguments of {name}, got {dict(given)!r} ({error})") from None

# SPDX-License-Identifier: Apache-2.0
"""Batching rules: under a vmap an operator runs once for each entry of the batch.

Two kinds of vmap ask for them: :func:`torch.vmap`, and the one behind
``torch.autograd.grad(..., is_grads_batched=True)`` and ``torch.autograd.functional.jacobian(..., vectorize=True)``. The
latter goes through backward operators only.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

# Operators without a rule: one writes to its arguments, one draws one mask a seed, and four never run under a vmap.
WITHOUT = (
    "update_running_stats_",
    "dropout_mask",
    "dense_block_inference",
    "pack_dense_block",
    "dual_path_stage_inference",
    "pack_dual_path_stage",
)

_LIBRARY = torch.library.Library("fastdense", "FRAGMENT")


def register_batching_rules() -> None:
    """Registers the rules of every operator that the extension defines."""
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, op = name.partition("::")
        if namespace == "fastdense" and op not in WITHOUT:
            call = getattr(torch.ops.fastdense, op).default
            torch.library.register_vmap(name, _rule(call))
            _LIBRARY.impl(op, _grads_rule(call), "Batched")


def _rule(op: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for :func:`torch.vmap`."""

    def run(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        flat, structure = _pytree.tree_flatten(arguments)
        dims = _pytree.tree_flatten(in_dims, is_leaf=lambda dim: dim is None)[0]

        def entry(at: int) -> Any:
            values = [value if dim is None else value.select(dim, at) for value, dim in zip(flat, dims, strict=True)]
            return op(*_pytree.tree_unflatten(values, structure))

        stacked = _stack([entry(at) for at in range(info.batch_size)])
        return stacked, _pytree.tree_map(lambda _: 0, stacked)

    return run


def _grads_rule(op: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for batched gradients."""

    def run(*arguments: Any) -> Any:
        level = level_of_gradients()
        flat, structure = _pytree.tree_flatten(arguments)
        # A tensor that has no batch of this level gets one of size 1.
        parts = [_batched(value, level) if isinstance(value, Tensor) else None for value in flat]
        size = max(part.shape[0] for part in parts if part is not None)

        def entry(at: int) -> Any:
            values = [v if p is None else p[min(at, len(p) - 1)] for v, p in zip(flat, parts, strict=True)]
            return op(*_pytree.tree_unflatten(values, structure))

        stacked = _stack([entry(at) for at in range(size)])
        return _pytree.tree_map(lambda t: torch._add_batch_dim(t, 0, level), stacked)

    return run


def level_of_gradients() -> int:
    """How many batches of gradients are around a backward pass."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def _batched(value: Tensor, level: int) -> Tensor:
    return torch._remove_batch_dim(value, level, 1, 0)


def _stack(entries: list[Any]) -> Any:
    """The results of all entries of a batch along a new first axis."""
    return _pytree.tree_map(lambda *parts: torch.stack(parts), *entries)

# SPDX-License-Identifier: Apache-2.0
"""Batching rules: under :func:`torch.vmap` an operator runs once for each entry of the batch.

What asks for them are the backward passes of ``torch.autograd.grad(..., is_grads_batched=True)`` and of
``torch.autograd.functional.jacobian(..., vectorize=True)``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

# Operators without a rule: one writes to its arguments, the other is not differentiable and draws one mask a seed.
WITHOUT = ("update_running_stats_", "dropout_mask")


def _rule(op: Callable[..., Any]) -> Callable[..., Any]:
    def run(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        flat, structure = _pytree.tree_flatten(arguments)
        dims = _pytree.tree_flatten(in_dims, is_leaf=lambda dim: dim is None)[0]
        made = []
        for at in range(info.batch_size):
            entries = [value if dim is None else value.select(dim, at) for value, dim in zip(flat, dims, strict=True)]
            made.append(op(*_pytree.tree_unflatten(entries, structure)))
        if isinstance(made[0], Tensor):
            return torch.stack(made), 0
        stacked = [torch.stack(parts) for parts in zip(*made, strict=True)]
        out_dims = [0] * len(stacked)
        return (tuple(stacked), tuple(out_dims)) if isinstance(made[0], tuple) else (stacked, out_dims)

    return run


def register_batching_rules() -> None:
    """Registers the rule for every operator that the extension defines."""
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, op = name.partition("::")
        if namespace == "fastdense" and op not in WITHOUT:
            torch.library.register_vmap(name, _rule(getattr(torch.ops.fastdense, op).default))

# SPDX-License-Identifier: Apache-2.0
"""What native operators return on tensors without memory: the meta device, the fakes of torch.compile."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the shapes of a native operator's results.

    Where all sizes are numbers, the operator itself checks its arguments and says what it would return
    (``fastdense_meta`` in csrc/library.cpp); the decorated formula is asked where some are symbols.

    Args:
        name: of the operator.
    """
    native = getattr(torch.ops.fastdense_meta, name)

    def register(formula: Callable[..., Any]) -> Callable[..., Any]:
        def fake(*arguments: Any) -> Any:
            return formula(*arguments) if _has_symbols(arguments) else native(*arguments)

        torch.library.register_fake(f"fastdense::{name}", fake)
        return formula

    return register


def _has_symbols(arguments: Any) -> bool:
    for leaf in _pytree.tree_leaves(arguments):
        sizes = (*leaf.shape, *leaf.stride()) if isinstance(leaf, Tensor) else (leaf,)
        if any(isinstance(size, torch.SymInt) for size in sizes):
            return True
    return False

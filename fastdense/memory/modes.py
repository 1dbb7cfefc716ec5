# SPDX-License-Identifier: Apache-2.0
"""The memory mode of each block of a converted model."""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from torch import nn

from fastdense._choices import SHARED_BUFFER_MODES, DualPathMemoryMode
from fastdense.fusion.base import FusedModule
from fastdense.fusion.checks import CALL_CONVERT, NotFusible, check_module
from fastdense.fusion.convert import Pattern, find, forget_equivalence_checks, set_mode
from fastdense.fusion.plan.state import memory_of
from fastdense.fusion.shared_buffer.block import SharedBuffer

Model = TypeVar("Model", bound=nn.Module)


class Block(NamedTuple):
    """A block of a converted model, and the modes that it has.

    ``is_fixed``: a dual path block that no operator runs, on a shared buffer or plain. Plans leave its mode alone.
    """

    name: str
    module: nn.Module
    modes: tuple[str, ...]
    is_fixed: bool = False

    @property
    def memory(self) -> str:
        """Its mode now."""
        return str(memory_of(self.module))


def fused_blocks(model: nn.Module) -> list[Block]:
    """The dense, residual dense and dual path blocks of a model that are converted, in its order."""
    found = [(name, module, kind) for name, module, kind in find(model) if kind.is_block]
    forget_equivalence_checks(model)
    return [_block(name, module, kind) for name, module, kind in found if isinstance(module, FusedModule)]


def _block(name: str, module: nn.Module, kind: Pattern) -> Block:
    if isinstance(module, SharedBuffer):
        return Block(name, module, SHARED_BUFFER_MODES)
    is_fixed = False
    if kind.shared_reader is not None:
        try:
            kind.reader(module)
        except NotFusible:
            is_fixed = True
    return Block(name, module, kind.memory_modes, is_fixed)


def set_memory(model: Model, memory: DualPathMemoryMode | Mapping[str, DualPathMemoryMode]) -> Model:
    """Sets what the blocks of a converted model save for the backward pass, in place.

    The numbers stay the same: outputs, gradients and running statistics are equal to the last bit in all modes but
    "reversible".

    Args:
        model: one that :func:`convert` returned, or a model of this library.
        memory: the mode of all blocks, see :func:`convert`; or a mode for each name of a block, as :func:`report` lists
            them, or of a module around blocks. The longest name that fits a block counts; others stay as they are.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is no module, or ``memory`` neither a mode nor a mapping of strings.
        ValueError: no fused blocks in the model; a name of no block; a mode that a block does not have. Nothing is
            changed then.

    Example:
        >>> import torchvision, fastdense
        >>> model = fastdense.convert(torchvision.models.densenet121())
        >>> _ = set_memory(model, {"features": "min", "features.denseblock1": "recompute"})
    """
    check_module("set_memory", model)
    blocks = fused_blocks(model)
    if not blocks:
        raise ValueError(f"set_memory: expected model to have fused blocks, got none; {CALL_CONVERT}")
    if not isinstance(memory, str | Mapping):
        raise TypeError(f"set_memory: expected memory to be a mode, or a dict of names and modes, got {memory!r}")
    modes = {"": memory} if isinstance(memory, str) else dict(memory)
    if odd := [name for name in modes if not isinstance(name, str)]:
        raise TypeError(f"set_memory: expected names of blocks to be strings, got {odd[0]!r}")
    chosen: dict[str, str] = {}
    for name in sorted(modes, key=len):
        inside = [block for block in blocks if name in ("", block.name) or block.name.startswith(f"{name}.")]
        if not inside:
            names = ", ".join(block.name or "''" for block in blocks)
            raise ValueError(
                f"set_memory: expected a name of a fused block or of what it is in ({names}), got {name!r}"
            )
        for block in inside:
            if modes[name] not in block.modes:
                raise ValueError(
                    f"set_memory: expected the mode of {block.name or 'the model'} to be one of {block.modes}, "
                    f"got {modes[name]!r}"
                )
            chosen[block.name] = modes[name]
    for block in blocks:
        if block.name in chosen:
            set_mode(block.module, chosen[block.name])  # type: ignore[arg-type]
    return model

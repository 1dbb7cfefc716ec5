# SPDX-License-Identifier: Apache-2.0
"""Makes the dense blocks of an existing model fast, in place, and plain again."""

import warnings
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from fastdense.nn.dense_block import PlainDenseBlock
from fastdense.nn.fused import (
    FusedDenseBlock,
    FusedModule,
    FusedSequential,
    FusedTransition,
    check_memory,
    fused_class,
    plain_class,
)
from fastdense.nn.structure import (
    BLOCKS,
    NotFusible,
    NotFusibleInTraining,
    is_transition,
    read_block,
    read_transition,
    runs_as,
)

Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model, *, memory: str = "balanced") -> Model:
    """Lets every dense block of ``model`` run on one shared buffer.

    Finds the dense blocks and transitions of torchvision, timm and MONAI DenseNets, and of models that contain them. A
    module only changes its class: parameters, buffers, hooks, ``state_dict`` keys and outputs stay what they are, an
    existing optimizer keeps working.

    Args:
        model: any module; changed in place.
        memory: "balanced" (default) keeps the 1x1 outputs for the backward pass, "min" computes them again. A
            converted model may be converted again to change it.

    Returns:
        ``model``.

    Raises:
        ValueError: if ``memory`` is unknown or ``model`` contains no dense block.

    Note:
        What cannot be fused (another norm or activation, a convolution with bias, hooks on inner modules ...) stays
        plain, with one warning that names the module and the reason. See :func:`restore`.

    Example:
        >>> import torchvision, fastdense
        >>> model = fastdense.convert(torchvision.models.densenet121())
    """
    check_memory(memory)
    modules = list(model.named_modules())
    blocks = [(name, module) for name, module in modules if is_block(module)]
    if not blocks:
        looked_for = ", ".join(".".join(known) for known in BLOCKS)
        raise ValueError(
            f"convert: expected model to contain dense blocks (looked for {looked_for}), got {type(model).__name__}"
        )
    for name, module in blocks:
        _try_fuse(name, module, FusedDenseBlock, read_block, memory)
    for name, module in modules:
        if is_transition_like(module):
            _try_fuse(name, module, FusedTransition, read_transition, memory)
    for _, module in modules:
        if type(module) is nn.Sequential and any(isinstance(inner, FusedDenseBlock) for inner in module.children()):
            module.__class__ = fused_class(FusedSequential, nn.Sequential)
    return model


def restore(model: Model) -> Model:
    """Gives the plain modules of a converted model back, in place.

    Models of :mod:`fastdense.models` become plain PyTorch as well; :func:`convert` makes them fast again.

    Args:
        model: any module; one without fused modules is left as it is.

    Returns:
        ``model``.
    """
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.__class__ = plain_class(type(module))
            for name in ("_fallback_reason", "_fused_name"):
                module.__dict__.pop(name, None)
            if not isinstance(module, PlainDenseBlock):
                module.__dict__.pop("memory", None)
    return model


def is_block(module: nn.Module) -> bool:
    """Whether ``module`` is a dense block, fused or of a class that :func:`convert` knows."""
    return isinstance(module, FusedDenseBlock) or runs_as(module, BLOCKS)


def is_transition_like(module: nn.Module) -> bool:
    """A sequence of exactly norm, (relu), conv, pool."""
    if isinstance(module, FusedTransition):
        return True
    is_sequence = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return is_sequence and is_transition(module)


def _try_fuse(
    name: str,
    module: nn.Module,
    mixin: type[FusedModule],
    read: Callable[[nn.Module], object],
    memory: str,
) -> None:
    """Fuses a module, or warns why it stays plain."""
    if not isinstance(module, FusedModule):
        try:
            read(module)
        except NotFusibleInTraining:
            pass
        except NotFusible as reason:
            warnings.warn(f"fastdense: {name or type(module).__name__} stays plain: {reason}", stacklevel=3)
            return
        module.__class__ = fused_class(mixin, type(module))
    module.__dict__["memory"] = memory
    module.__dict__["_fused_name"] = name

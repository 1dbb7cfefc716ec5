# SPDX-License-Identifier: Apache-2.0
"""Converts the dense and dual path blocks of an existing model in place to fused ones, and back."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import nn

from fastdense._choices import DUAL_PATH_MEMORY_MODES, MEMORY_MODES, SHARED_BUFFER_MODES, DualPathMemoryMode
from fastdense.fusion.base import FusedModule, fused_class
from fastdense.fusion.checks import (
    NORMS,
    NotFusible,
    NotFusibleInTraining,
    check_methods,
    check_module,
    forward_of,
    is_known_class,
)
from fastdense.fusion.dense_block import FusedDenseBlock, FusedTransition, RecomputedTransition
from fastdense.fusion.dense_layers import BLOCKS, is_transition, read_block, read_transition
from fastdense.fusion.dual_path import FusedDualPathBlock
from fastdense.fusion.dual_path_layers import DUAL_PATH_BLOCKS, read_dual_path_block
from fastdense.fusion.inferred_block import FusedInferredBlock, FusedInferredLayers
from fastdense.fusion.inferred_layers import (
    container_of_layers,
    count_heads,
    looks_like_dense_block,
    read_inferred_block,
    read_inferred_layers,
)
from fastdense.fusion.max_pool_transition import POOLS, looks_like_max_pool_transition, read_max_pool_transition
from fastdense.fusion.plan.code import is_replaced
from fastdense.fusion.plan.kept import check_sources, read_sources
from fastdense.fusion.plan.state import STATE, plain_class, state_of
from fastdense.fusion.residual_dense_block import FusedResidualDenseBlock, FusedSRDenseBlock
from fastdense.fusion.residual_layers import (
    looks_like_growing_block,
    looks_like_residual_block,
    read_growing_block,
    read_residual_block,
    runs_layers_apart,
)
from fastdense.fusion.sequential import FusedSequential
from fastdense.fusion.shared_buffer.block import SharedBuffer, SharedBufferLayers, read_own_layers
from fastdense.fusion.shared_buffer.dual_path import read_shared_dual_path
from fastdense.fusion.shared_buffer.layers import about_shared_buffer
from fastdense.fusion.shared_buffer.trial import read_shared_block
from fastdense.ops.arguments import check_memory
from fastdense.plain.dense_block import PlainDenseBlock
from fastdense.plain.dual_path import PlainDualPathBlock
from fastdense.plain.shared_buffer_block import PlainSharedBufferBlock

Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model, *, memory: DualPathMemoryMode = "balanced") -> Model:
    """Converts the dense and dual path blocks of ``model`` in place, so that they run on shared buffers.

    Dense blocks and transitions of torchvision, timm and MONAI are recognised by class, and so are dual path blocks of
    timm, segmentation_models_pytorch and pretrainedmodels. Dense blocks and residual dense blocks of any other class
    are recognised by their channel pattern. They are fused if they pass a numerical check: on a copy, outputs and
    gradients must agree with the definition of such a block.

    Only the class of a module changes. Parameters, buffers, hooks, ``state_dict`` keys and outputs stay the same. An
    existing optimizer keeps working.

    Args:
        model: any module; changed in place.
        memory: "balanced" (default) saves the outputs inside the bottlenecks for backward, "min" recomputes them,
            "recompute" saves the input of each block alone and runs the block again, and with it a stem of convolution,
            norm, ReLU and max pool in front. "reversible", for dual path blocks only, reconstructs the residual path
            from its final value. :func:`set_memory` changes the mode, of single blocks too.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if ``model`` contains no such block, or ``memory`` is not a mode of one that it contains.

    Note:
        Modules that cannot be fused (a norm or activation that the operator lacks, hooks on inner modules ...)
        stay plain, or with "min" and "recompute" run twice on a shared buffer where they can. One warning names the
        module and the reason. See :func:`restore`.

    Example:
        >>> import torchvision, fastdense
        >>> model = fastdense.convert(torchvision.models.densenet121())
    """
    check_module("convert", model)
    for module in model.modules():
        if forward_of(module) is SharedBuffer.forward:  # which another mode, or an edit, may have made another kind
            module.__class__ = plain_class(type(module))
    found = find(model)
    if not any(kind.is_block for _, _, kind in found):
        looked_for = ", ".join(".".join(known) for known in BLOCKS + DUAL_PATH_BLOCKS)
        raise ValueError(
            f"convert: expected model to contain dense, residual dense or dual path blocks, got {type(model).__name__} "
            f"with none (looked for {looked_for}, and for layers that read all earlier features)"
        )
    for _, _, kind in found:
        check_memory("convert", memory, kind.memory_modes)
    for kind in PATTERNS:
        for name, module, its_kind in found:
            if its_kind is kind:
                _try_fuse(name, module, kind, memory)
    _say_what_moves_twice(found)
    forget_equivalence_checks(model)
    for module in model.modules():
        if type(module) is nn.Sequential and any(isinstance(inner, _IN_SEQUENCES) for inner in module.children()):
            module.__class__ = fused_class(FusedSequential, nn.Sequential)
        _note_stem(list(module.children()))
    return model


def _note_stem(modules: list[nn.Module]) -> None:
    """Lets the first dense block among the children of a module know that a stem with a max pool is in front of it."""
    for at, module in enumerate(modules):
        if isinstance(module, FusedDenseBlock):
            pools = at > 1 and isinstance(modules[at - 1], POOLS)
            state_of(module).has_stem = pools and any(isinstance(norm, NORMS) for norm in modules[max(0, at - 3) : at])
            return


def _say_what_moves_twice(found: list[tuple[str, nn.Module, "Pattern"]]) -> None:
    """Warns of layers under a checkpoint, whose plain modules move running statistics in the backward pass as well."""
    states = [(name, state_of(module)) for name, module, _ in found if isinstance(module, FusedModule)]
    outcomes = [(name, known.found) for name, s in states for known in (s.outcome, s.shared_outcome) if known]
    names = dict.fromkeys(name or "the model" for name, form in outcomes if getattr(form, "moves_twice", False))
    if names:
        warnings.warn(
            f"fastdense: {', '.join(names)}: plain modules under torch.utils.checkpoint move running statistics twice "
            "a step; converted, they move once",
            stacklevel=3,
        )


def restore(model: Model) -> Model:
    """Turns a converted model back into plain modules, in place.

    Models of :mod:`fastdense.models` become plain PyTorch as well; :func:`convert` converts them again.

    Args:
        model: any module; one without fused modules is left as it is.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is no module.
    """
    check_module("restore", model)
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.__class__ = plain_class(type(module))
            module.__dict__.pop(STATE, None)
    return model


class Pattern(NamedTuple):
    """Modules that can be fused: what they are called, the mixin, how to tell and to read one.

    ``has_layers``: a dense block, whose layers may run on a shared buffer as plain modules where no operator can.
    ``shared_reader``: reads a block for the same, which the mixin does by itself.
    """

    name: str
    mixin: type[FusedModule]
    matches: Callable[[nn.Module], bool]
    reader: Callable[[Any], object]
    is_block: bool
    memory_modes: tuple[str, ...] = MEMORY_MODES
    has_layers: bool = False
    shared_reader: Callable[[Any], object] | None = None

    def read(self, module: nn.Module) -> None:
        """Raises NotFusible where the module cannot be fused."""
        check_sources(read_sources((module,)))
        check_methods(module, "it", besides=("forward",))
        self.reader(module)

    def why_not_shared(self, module: nn.Module) -> str | None:
        """Why a module cannot run on a shared buffer as plain modules, "" where its kind never does; None if it can."""
        if self.has_layers:
            return _why_not(module, _SHARED)
        return "" if self.shared_reader is None else _why_not(module, self._replace(reader=self.shared_reader))


def _is_sequence(module: nn.Module) -> bool:
    """Whether a module calls its children in turn, or did before somebody replaced its library's code."""
    if not isinstance(module, nn.Sequential):
        return False
    return type(module).forward is nn.Sequential.forward or is_replaced(type(module), "forward")


def _is_on_shared_buffer(module: nn.Module) -> bool:
    return isinstance(module, SharedBuffer)


def _is_own_shared_block(module: nn.Module) -> bool:
    return isinstance(module, PlainSharedBufferBlock)


def _is_dense_block(module: nn.Module) -> bool:
    if isinstance(module, FusedDenseBlock):
        return not isinstance(module, FusedInferredBlock)
    return is_known_class(module, BLOCKS)


def _is_inferred_block(module: nn.Module) -> bool:
    if any(_is_dual_path_block(inner) for inner in module.children()):  # whose "b" variants have the channels of layers
        return False
    return isinstance(module, FusedInferredBlock) or looks_like_dense_block(module)


def _is_inferred_layers(module: nn.Module) -> bool:
    return isinstance(module, FusedInferredLayers) or (_is_sequence(module) and count_heads(module) > 0)


def _is_dual_path_block(module: nn.Module) -> bool:
    return isinstance(module, FusedDualPathBlock) or is_known_class(module, DUAL_PATH_BLOCKS)


def _is_transition_like(module: nn.Module) -> bool:
    """A sequence of exactly norm, (relu), conv, pool."""
    if isinstance(module, FusedTransition):
        return True
    return _is_sequence(module) and is_transition(module)


def _is_max_pool_transition(module: nn.Module) -> bool:
    if isinstance(module, RecomputedTransition):
        return True
    return _is_sequence(module) and looks_like_max_pool_transition(list(module.children()))


def _is_residual_dense_block(module: nn.Module) -> bool:
    if runs_layers_apart(module):
        return False
    return isinstance(module, FusedResidualDenseBlock) or looks_like_residual_block(module)


def _is_sr_dense_block(module: nn.Module) -> bool:
    return isinstance(module, FusedSRDenseBlock) or looks_like_growing_block(module)


# Of dual path blocks; a transition with a max pool keeps the same in all modes.
ANY_MODE = DUAL_PATH_MEMORY_MODES


_INFERRED = Pattern("block", FusedInferredBlock, _is_inferred_block, read_inferred_block, True, has_layers=True)
_SHARED = Pattern("block", SharedBuffer, _is_on_shared_buffer, read_shared_block, True)


PATTERNS = (
    Pattern("block", SharedBufferLayers, _is_own_shared_block, read_own_layers, True),
    _SHARED,
    Pattern("block", FusedDenseBlock, _is_dense_block, read_block, True, has_layers=True),
    _INFERRED,
    Pattern("transition", FusedTransition, _is_transition_like, read_transition, False),
    Pattern(
        "max-pool transition", RecomputedTransition, _is_max_pool_transition, read_max_pool_transition, False, ANY_MODE
    ),
    Pattern(
        "dual path",
        FusedDualPathBlock,
        _is_dual_path_block,
        read_dual_path_block,
        True,
        ANY_MODE,
        shared_reader=read_shared_dual_path,
    ),
    Pattern("residual dense", FusedResidualDenseBlock, _is_residual_dense_block, read_residual_block, True),
    Pattern("block", FusedInferredLayers, _is_inferred_layers, read_inferred_layers, True, has_layers=True),
    Pattern("growing dense", FusedSRDenseBlock, _is_sr_dense_block, read_growing_block, True),
)


# A sequence that holds one of these looks for what runs together.
_IN_SEQUENCES = (FusedDenseBlock, FusedDualPathBlock, FusedSRDenseBlock)


def find(model: nn.Module) -> list[tuple[str, nn.Module, Pattern]]:
    """All modules of a kind, in the model's order."""
    found = [
        (name, module, kind)
        for name, module in model.named_modules()
        if (kind := next((kind for kind in PATTERNS if kind.matches(module)), None)) is not None
    ]
    candidates = {id(module) for _, module, kind in found if kind is _INFERRED}
    left_out = set()
    for _, module, kind in found:
        # A sequence of layers is the block where these join their features themselves, else the module around it.
        inner = container_of_layers(module) if kind is _INFERRED else module
        if inner is not module and id(inner) in candidates:
            is_block = _why_not(inner, kind) is None or _why_not(inner, _SHARED) is None
            left_out.add(id(module) if is_block else id(inner))
    return [entry for entry in found if id(entry[1]) not in left_out]


def _why_not(module: nn.Module, kind: Pattern) -> str | None:
    """Why a module cannot run as one of a kind; None where it can."""
    try:
        kind.read(module)
    except NotFusible as reason:
        return str(reason)
    return None


def forget_equivalence_checks(model: nn.Module) -> None:
    """Leaves modules that are not fused as they were."""
    for module in model.modules():
        if not isinstance(module, FusedModule):
            module.__dict__.pop(STATE, None)


def _try_fuse(name: str, module: nn.Module, kind: Pattern, memory: DualPathMemoryMode) -> None:
    """Fuses a module, or warns why it stays plain."""
    if isinstance(module, FusedModule):
        if memory in SHARED_BUFFER_MODES and _goes_on_shared_buffer(module, kind):
            module.__class__ = fused_class(SharedBuffer, plain_class(type(module)))
    else:
        try:
            kind.read(module)
        except NotFusibleInTraining:
            pass
        except NotFusible as reason:
            why_not_shared = kind.why_not_shared(module)
            if why_not_shared is not None or memory not in SHARED_BUFFER_MODES:
                why = about_shared_buffer(str(reason), why_not_shared, memory)
                warnings.warn(f"fastdense: {name or type(module).__name__} stays plain: {why}", stacklevel=3)
                return
            kind = _SHARED if kind.has_layers else kind
        module.__class__ = fused_class(kind.mixin, type(module))
    state_of(module).name = name
    set_mode(module, memory)


def _goes_on_shared_buffer(module: nn.Module, kind: Pattern) -> bool:
    """Whether a fused dense block has been edited so that only its plain modules can run."""
    try:
        kind.read(module)
    except NotFusibleInTraining:
        return False
    except NotFusible:
        return kind.has_layers and _why_not(module, _SHARED) is None
    return False


def set_mode(module: nn.Module, memory: DualPathMemoryMode) -> None:
    """Sets what a fused module saves for backward, where :func:`fastdense.fusion.plan.state.memory_of` reads it."""
    if isinstance(module, PlainDenseBlock | PlainDualPathBlock):
        module.memory = memory
    else:
        state_of(module).memory = memory

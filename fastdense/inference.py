# SPDX-License-Identifier: Apache-2.0
"""Keeps the weights of dense blocks and dual path stages packed, for inference."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

from fastdense._C import WeightVersions
from fastdense.fusion import dense_block, dual_path, inferred_block
from fastdense.fusion.base import plan_of
from fastdense.fusion.checks import CALL_CONVERT, NORMS, NotFusible, check_module
from fastdense.fusion.dense_block import BlockPlan, FusedDenseBlock
from fastdense.fusion.dual_path import FusedDualPathBlock, StagePlan, StagesPlan
from fastdense.fusion.inferred_block import FusedInferredBlock, FusedInferredLayers
from fastdense.fusion.plan.frozen import FrozenWeights, watched
from fastdense.fusion.plan.state import state_of
from fastdense.fusion.sequential import FusedSequential, runs_of
from fastdense.ops.arguments import PackedWeights
from fastdense.ops.dense_block import FlatBlock
from fastdense.ops.dense_block_inference import pack_block
from fastdense.ops.dual_path import FlatStage, pack_stage

Model = TypeVar("Model", bound=nn.Module)
_BLOCKS = (FusedDenseBlock, FusedInferredLayers, FusedDualPathBlock)


def freeze(model: Model) -> Model:
    """Folds and packs the weights of a converted model's blocks once, for faster inference, in place.

    Without it every call packs all weights anew. A frozen dense block, or row of dual path blocks, keeps a copy of its
    weights, in the layout that the processor's instructions want: about as many bytes as its 1x1 convolutions have,
    and five times those of a dense block's 3x3 convolutions; :func:`report` shows them. Outputs are the same to
    rounding. They are used by calls that want no gradient, as under :class:`torch.inference_mode` or
    :class:`torch.no_grad`, on the CPU, in the type of the weights.

    What torch sees of a change thaws a block at its next call, which then runs as before ``freeze``: ``model.train()``,
    ``load_state_dict``, a step of an optimizer, moving or casting. While a hook is there, calls run as if nothing were
    frozen. Writes through ``.data``, ``.numpy()`` or to parameters made under :class:`torch.inference_mode` leave no
    trace, nor do those of ``torch.distributed``, such as ``broadcast``: call :func:`thaw` first, or ``freeze`` again.
    Copies, pickles and ``state_dict`` do not have the packed weights. Threads share them.

    Args:
        model: one that :func:`convert` returned, or a model of this library, in eval mode.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: no converted dense or dual path blocks; a block in training mode; or no block that can be frozen,
            with the reason: those with batch norm and ReLU, without dropout in eval mode, on the CPU can.

    Example:
        >>> import torch, torchvision, fastdense
        >>> model = fastdense.freeze(fastdense.convert(torchvision.models.densenet121()).eval())
        >>> with torch.inference_mode():
        ...     _ = model(torch.randn(1, 3, 64, 64))
    """
    check_module("freeze", model)
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, _BLOCKS)}
    if not blocks:
        raise ValueError(
            f"freeze: expected model to have converted dense or dual path blocks, got none; {CALL_CONVERT}"
        )
    for name, block in blocks.items():
        if block.training or any(inner.training for inner in block.modules() if isinstance(inner, NORMS)):
            raise ValueError(
                f"freeze: expected model to be in eval mode, got {name or 'it'} in training mode; call model.eval()"
            )
    made = []
    reason = ""
    for plan in freezable_plans(model):
        try:
            made.append((plan.freezer, _frozen(plan)))
        except NotFusible as error:
            reason = reason or str(error)
    if not made:
        raise ValueError(f"freeze: no block of the model can be frozen: {reason or 'its blocks run as plain modules'}")
    thaw(model)
    for freezer, frozen in made:
        if freezer is not None:
            freezer.freeze(frozen)
    return model


def thaw(model: Model) -> Model:
    """Drops the packed weights that :func:`freeze` made, in place.

    Args:
        model: any module.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is no module.
    """
    check_module("thaw", model)
    for module in model.modules():
        if isinstance(module, _BLOCKS):
            state_of(module).freezer.kept = None
    return model


def freezable_plans(model: nn.Module) -> Iterator[BlockPlan | StagePlan]:
    """The plans of all dense blocks and dual path stages, of each as the model runs it: with what reads it, where that
    is known."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, FusedSequential):
            for modules, run in runs_of(module):
                found.update(modules)
                yield from run.plans
    for module in model.modules():
        if isinstance(module, _BLOCKS) and module not in found:
            with contextlib.suppress(NotFusible):
                yield from _plans_alone(module)


def _plans_alone(block: nn.Module) -> Sequence[BlockPlan | StagePlan]:
    if isinstance(block, FusedDualPathBlock):
        plan = plan_of(block, dual_path.plan)
        return plan.stages if isinstance(plan, StagesPlan) else ()
    if isinstance(block, FusedInferredLayers):
        return (plan_of(block, inferred_block.plan_layers).block,)
    return (plan_of(block, inferred_block.plan if isinstance(block, FusedInferredBlock) else dense_block.plan),)


def _frozen(plan: BlockPlan | StagePlan) -> FrozenWeights:
    flat = plan.flat
    if isinstance(plan, StagePlan) and plan.row is None:
        raise NotFusible(
            "dual path blocks with stochastic depth or two last convolutions, as in dpn68b, are not packed"
        )
    if not plan.infers or flat is None:
        raise NotFusible("only blocks of batch norms with running statistics and ReLU, without dropout, are packed")
    dtypes = set(flat.conv_dtypes)
    if [device.type for device in flat.devices] != ["cpu"] or len(dtypes) != 1:
        raise NotFusible("only blocks on the CPU, whose convolutions have one type, are packed")
    norms = [norm for norm, _ in plan.norms]
    versions = WeightVersions(watched(flat, norms))  # before reading them
    with torch.no_grad():
        packed = _packed(flat, plan.in_channels)
    return FrozenWeights(flat, norms, packed, dtypes.pop(), versions)


def _packed(flat: FlatBlock | FlatStage, in_channels: int) -> PackedWeights:
    return pack_stage(flat, in_channels) if isinstance(flat, FlatStage) else pack_block(flat, in_channels)

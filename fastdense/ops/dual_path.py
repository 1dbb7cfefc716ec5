# SPDX-License-Identifier: Apache-2.0
"""A stage of dual path blocks on one output buffer, as one differentiable operator."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdense._choices import DUAL_PATH_MEMORY_MODES, DualPathMemoryMode
from fastdense.ops.arguments import (
    BatchStatistics,
    NormWeights,
    PackedWeights,
    Parameters,
    cast_input,
    check_batch_norms,
    check_input,
    check_memory,
    empty_channels_last,
    fake_gradients,
    fill_absent,
    fix_statistics,
    records_gradient,
    statistics_dtype,
)
from fastdense.ops.autograd import no_double_backward, register_autograd, run_again, save, saved, wanted
from fastdense.ops.fakes import register_fake


class ProjectionWeights(NamedTuple):
    """The projection at the head of a stage: norm, ReLU, conv ``[R + D0, C_in, 1...]``."""

    norm: NormWeights
    conv: Tensor


class DualPathWeights(NamedTuple):
    """One block: norm_a, ReLU, conv_a ``[ra, C_i, 1...]``, norm_b, ReLU, conv_b ``[rb, ra / groups, 3...]``, norm_c,
    ReLU, conv_c ``[R + K, rb, 1...]``."""

    norm_a: NormWeights
    conv_a: Tensor
    norm_b: NormWeights
    conv_b: Tensor
    norm_c: NormWeights
    conv_c: Tensor


class FlatStage(NamedTuple):
    """A stage's weights and eps in the order in which the native operator reads them; None for what is absent."""

    weights: list[Tensor | None]
    eps: list[float]
    num_blocks: int
    projection: bool
    residual_channels: int
    stride: int
    running: list[int]  # positions of running statistics
    devices: list[torch.device]
    conv_dtypes: list[torch.dtype]


def dual_path_stage(
    input: Tensor,
    blocks: Sequence[DualPathWeights],
    *,
    residual_channels: int,
    projection: ProjectionWeights | None = None,
    stride: int = 1,
    memory: DualPathMemoryMode = "balanced",
    process_group: str = "",
) -> tuple[Tensor, BatchStatistics]:
    """Runs a stage of dual path blocks without concatenating.

    With ``[x; y]`` for channels side by side and ``R = residual_channels``, the stage starts from
    ``[r_0; d_0] = projection(input)``, or from the input itself, and block ``i`` computes

        z = conv_c(relu(norm_c(conv_b(relu(norm_b(conv_a(relu(norm_a([r_{i-1}; d_{i-1}]))))))))
        r_i = r_{i-1} + z[:R],    d_i = [d_{i-1}; z[R:]]

    (with a projection the first block's conv_a reads the input). Batch statistics are computed once per dense channel,
    and once per block of the residual path.

    Args:
        input: ``[N, C_in, spatial]`` with one to three spatial dimensions; float64, float32, bfloat16 or float16; any
            strides. Under autocast it is cast to the autocast type.
        blocks: parameters of the ``n`` blocks, at least one.
        residual_channels: ``R``, at least 0; 0 leaves a dense block, while ``K = 0`` leaves a residual one.
        projection: parameters of the projection, or None where the input is ``[r_0; d_0]`` already.
        stride: of the projection and of the first block's conv_b; 1 without a projection.
        memory: what is saved for backward. "balanced": the residual path after each block and the outputs of conv_a and
            conv_b. "min": the residual path only; the convolutions are recomputed. "reversible": the outputs of the
            convolutions only; the residual path is reconstructed from its final value by subtraction (float32 and
            float64 only: 16 bits are not accurate enough). "recompute": the input only; the stage is run again, as with
            "min", to which its gradients are equal to the last bit.
        process_group: name of the torch.distributed group that shares batch statistics, as
            :class:`torch.nn.SyncBatchNorm` does; "" for this process alone. All of its processes call the op together.

    Returns:
        ``[r_n; d_n]``, ``[N, R + D0 + n * K, spatial / stride]`` with its channels innermost in memory, and the batch
        statistics of the norms in the order of the arguments: the projection's, then norm_a, norm_b, norm_c of each
        block.

    Raises:
        ValueError: shapes that do not fit, mixed devices, one value per channel in training, unknown ``memory``.
        TypeError: a dtype that is not floating point, or weights of another dtype than the input's.
        NotImplementedError: "reversible" with a 16-bit type.

    Note:
        Running statistics are not updated: see :func:`update_running_stats_`. Saved for backward beside the output, in
        numbers per pixel: ``(n - 1) * R + n * (ra + rb)`` ("balanced"), ``(n - 1) * R`` ("min") or ``n * (ra + rb)``
        ("reversible"); with "recompute" the input and the statistics alone. The second run of that mode takes no
        statistics and exchanges nothing with other processes; under torch.compile it is not made, and "min" takes its
        place. Reruns on one machine with one thread count are bit-identical. Double backward raises.

    Reference:
        Y. Chen, J. Li, H. Xiao, X. Jin, S. Yan, J. Feng. Dual Path Networks. NIPS 2017, arXiv:1707.01629, equations
        5 to 8 and section 4.
    """
    flat = flatten_stage(blocks, projection, residual_channels, stride)
    return run_flat_stage(input, flat, flat.weights, memory=memory, process_group=process_group)


def run_flat_stage(
    input: Tensor,
    flat: FlatStage,
    weights: Sequence[Tensor | None],
    *,
    memory: str = "balanced",
    process_group: str = "",
    contiguous: bool = False,
) -> tuple[Tensor, BatchStatistics]:
    """:func:`dual_path_stage` with its weights in a list: those of ``flat``, or copies of them."""
    op = "dual_path_stage"
    check_memory(op, memory, DUAL_PATH_MEMORY_MODES)
    check_input(op, input)
    given = fill_absent(weights, input)
    input = cast_input(op, input, flat.devices, flat.conv_dtypes)
    records = records_gradient(input, given)
    if memory == "recompute" and torch.compiler.is_compiling():
        memory = "min"
    if records and memory == "reversible" and input.dtype not in (torch.float32, torch.float64):
        raise NotImplementedError(
            f'{op}: expected input to be float32 or float64 with memory="reversible", got {input.dtype}; '
            'use memory="balanced" or "min"'
        )
    out, _, _, _, mean, var = torch.ops.fastdense.dual_path_stage(
        input,
        given,
        flat.eps,
        flat.num_blocks,
        flat.projection,
        flat.residual_channels,
        flat.stride,
        memory if records else "nothing",
        process_group,
        contiguous,
    )
    return out, BatchStatistics(mean, var)


def flatten_stage(
    blocks: Sequence[DualPathWeights], projection: ProjectionWeights | None, residual_channels: int, stride: int
) -> FlatStage:
    parameters = Parameters()
    if projection is not None:
        parameters.norm(projection.norm)
        parameters.conv(projection.conv)
    for block in blocks:
        for norm, conv in (
            (block.norm_a, block.conv_a),
            (block.norm_b, block.conv_b),
            (block.norm_c, block.conv_c),
        ):
            parameters.norm(norm)
            parameters.conv(conv)
    check_batch_norms("dual_path_stage", parameters.groups)
    return FlatStage(
        parameters.weights,
        parameters.eps,
        len(blocks),
        projection is not None,
        residual_channels,
        stride,
        parameters.running,
        parameters.devices,
        parameters.conv_dtypes,
    )


def pack_stage(flat: FlatStage, in_channels: int) -> PackedWeights:
    """The weights of a stage as :func:`run_stage_inference` reads them, with the scales and shifts of its norms."""
    weights = fill_absent(flat.weights, torch.empty(0))
    tensors = torch.ops.fastdense.pack_dual_path_stage(
        weights, flat.eps, in_channels, flat.num_blocks, flat.projection, flat.residual_channels, flat.stride
    )
    return PackedWeights(weights, tensors)


def run_stage_inference(input: Tensor, flat: FlatStage, packed: PackedWeights, *, contiguous: bool = False) -> Tensor:
    """The output of :func:`fastdense.ops.dual_path_stage` where all norms have running statistics, to the last bit.

    Args:
        input: ``[N, C_in, spatial]`` on the CPU.
        flat: the stage.
        packed: what :func:`pack_stage` made of its weights.
        contiguous: whether the result is.
    """
    op = "dual_path_stage_inference"
    check_input(op, input)
    input = cast_input(op, input, flat.devices, flat.conv_dtypes)
    return torch.ops.fastdense.dual_path_stage_inference(
        input,
        packed.weights,
        flat.eps,
        flat.num_blocks,
        flat.projection,
        flat.residual_channels,
        flat.stride,
        packed.tensors,
        contiguous,
    )


def empty_stage_output(
    input: Tensor,
    weights: Sequence[Tensor],
    num_blocks: int,
    projection: bool,
    residual_channels: int,
    stride: int,
) -> Tensor:
    """A tensor like the output of a stage, ``[N, R + D0 + n * K, spatial / stride]``, without numbers."""
    batch, in_channels, *spatial = input.shape
    read = weights[4].shape[0] if projection else in_channels
    growth = weights[19 if projection else 14].shape[0] - residual_channels
    return empty_channels_last(
        input, [batch, read + num_blocks * growth, *((size - 1) // stride + 1 for size in spatial)]
    )


@register_fake("dual_path_stage")
def _(
    input: Tensor,
    weights: Sequence[Tensor],
    eps: Sequence[float],
    num_blocks: int,
    projection: bool,
    residual_channels: int,
    stride: int,
    memory: str,
    process_group: str,
    contiguous: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, in_channels, *spatial = input.shape
    first = 5 if projection else 0
    conv_a, conv_b, conv_c = (weights[first + at] for at in (4, 9, 14))
    width_a, width_b, growth = conv_a.shape[0], conv_b.shape[0], conv_c.shape[0] - residual_channels
    read = in_channels if not projection else weights[4].shape[0]  # R + D0
    pixels = in_pixels = batch
    for size in spatial:
        in_pixels = in_pixels * size
        pixels = pixels * ((size - 1) // stride + 1)
    channels = [in_channels] + [read + i * growth for i in range(1, num_blocks)]
    statistics = sum(channels) + num_blocks * (width_a + width_b) + (in_channels if projection else 0)
    out = empty_stage_output(input, weights, num_blocks, projection, residual_channels, stride)
    bottlenecks = memory in ("balanced", "reversible")
    residuals = input.new_empty([num_blocks - 1 if memory in ("balanced", "min") else 0, pixels, residual_channels])
    a = input.new_empty([in_pixels + (num_blocks - 1) * pixels if bottlenecks else 0, width_a])
    b = input.new_empty([num_blocks * pixels if bottlenecks else 0, width_b])
    mean = input.new_empty([statistics], dtype=statistics_dtype(input))
    return out.contiguous() if contiguous else out, residuals, a, b, mean, torch.empty_like(mean)


@register_fake("_dual_path_stage_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    out: Tensor,
    residuals: Tensor,
    a: Tensor,
    b: Tensor,
    mean: Tensor,
    var: Tensor,
    weights: Sequence[Tensor],
    eps: Sequence[float],
    num_blocks: int,
    projection: bool,
    residual_channels: int,
    stride: int,
    needs_grad: Sequence[bool],
    process_group: str,
) -> list[Tensor]:
    return fake_gradients(input, weights, needs_grad)


@register_fake("dual_path_stage_inference")
def _(
    input: Tensor,
    weights: Sequence[Tensor],
    eps: Sequence[float],
    num_blocks: int,
    projection: bool,
    residual_channels: int,
    stride: int,
    packed: Sequence[Tensor],
    contiguous: bool = False,
) -> Tensor:
    out = empty_stage_output(input, weights, num_blocks, projection, residual_channels, stride)
    return out.contiguous() if contiguous else out


@register_fake("pack_dual_path_stage")
def _(weights: Sequence[Tensor], *how: Any) -> list[Tensor]:
    known = [weight.new_empty([int(size) for size in weight.shape]) for weight in weights]  # panels of known sizes
    return torch.ops.fastdense.pack_dual_path_stage(known, *how)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, weights, eps, num_blocks, projection, residual_channels, stride, memory, process_group, *_ = inputs
    out, residuals, a, b, mean, var = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, var)
    ctx.recompute = memory == "recompute"
    save(ctx, input, *([None] * 4 if ctx.recompute else [out, residuals, a, b]), mean, var, *weights)
    ctx.arguments = (eps, num_blocks, projection, residual_channels, stride)
    ctx.process_group = process_group


def _run_again(
    arguments: tuple[Any, ...], input: Tensor, mean: Tensor, var: Tensor, weights: list[Tensor]
) -> list[Tensor]:
    """What "min" keeps, from the stage's input, by the batch statistics that its first run took."""
    _, _, projection, _, _ = arguments
    weights, first = list(weights), 0
    for norm in range(0, len(weights), 5):  # its four tensors, then the convolution behind it
        is_grouped = (norm // 5 - projection) % 3 == 1  # conv_b, which has the channels of conv_a's result
        channels = weights[norm - 1].shape[0] if is_grouped else weights[norm + 4].shape[1]
        fix_statistics(weights, norm, mean, var, first, channels)
        first += channels
    return run_again(torch.ops.fastdense.dual_path_stage, input, weights, *arguments, "min", "", False)[:4]


def _backward(ctx: Any, needs: Sequence[bool], grad_output: Tensor | None, *_: Tensor | None) -> list[Tensor | None]:
    if grad_output is None:
        return [None] * len(needs)
    input, out, residuals, a, b, mean, var, *weights = saved(ctx)
    if ctx.recompute:
        out, residuals, a, b = _run_again(ctx.arguments, input, mean, var, weights)
    grads = torch.ops.fastdense._dual_path_stage_backward(
        grad_output, input, out, residuals, a, b, mean, var, weights, *ctx.arguments, needs, ctx.process_group
    )
    return wanted(grads, needs)


register_autograd("dual_path_stage", _backward, setup_context=_setup_context)
register_autograd("_dual_path_stage_backward", no_double_backward("dual_path_stage"))

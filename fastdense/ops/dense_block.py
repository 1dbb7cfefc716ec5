# SPDX-License-Identifier: Apache-2.0
"""The dense block on one shared buffer, as one differentiable operator."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdense._choices import MEMORY_MODES, MemoryMode
from fastdense.ops.activation import IDENTITY, RELU, Activation
from fastdense.ops.arguments import (
    BatchStatistics,
    NormWeights,
    Parameters,
    cast_input,
    check_input,
    check_memory,
    count_pixels,
    empty_channels_last,
    fake_gradients,
    fill_absent,
    fix_statistics,
    records_gradient,
    statistics_dtype,
)
from fastdense.ops.autograd import no_double_backward, register_autograd, run_again, save, saved, wanted
from fastdense.ops.fakes import register_fake


class LayerWeights(NamedTuple):
    """One layer: norm1, act1, conv1 ``[b, c, 1...]``, norm2, act2, conv2 ``[k, b, 3...]``; biases ``[b]``, ``[k]``.

    Without a bottleneck ``conv1`` and ``norm2`` are None and conv2 is ``[k, c, 3...]``.
    """

    norm1: NormWeights
    conv1: Tensor | None
    norm2: NormWeights | None
    conv2: Tensor
    act1: Activation = RELU
    act2: Activation = RELU
    bias1: Tensor | None = None
    bias2: Tensor | None = None


class TailWeights(NamedTuple):
    """What reads the finished block: a transition (``conv`` ``[co, C, 1...]``) or a last norm (``conv`` None).

    ``relu`` False leaves the activation of a last norm out.
    """

    norm: NormWeights
    conv: Tensor | None
    relu: bool = True
    act: Activation = RELU
    bias: Tensor | None = None

    @property
    def kind(self) -> str:
        return "transition" if self.conv is not None else "norm_relu" if self.relu else "norm"


class FlatBlock(NamedTuple):
    """A block's weights and eps in the order in which the native operator reads them; None for what is absent.

    ``activations`` and ``numbers`` are empty where all activations are ReLU, ``groups`` where norms take the statistics
    of the batch.
    """

    weights: list[Tensor | None]
    eps: list[float]
    num_layers: int
    bottleneck: bool
    tail: str
    running: list[int]  # positions of running statistics
    devices: list[torch.device]
    conv_dtypes: list[torch.dtype]
    activations: str  # names, separated by commas
    numbers: list[float]  # two of each activation
    groups: list[int]  # of each norm

    @property
    def has_only_relu(self) -> bool:
        """Whether there are no other activations, no biases and no norms of samples."""
        convs = self.num_layers * (2 if self.bottleneck else 1) + (self.tail == "transition")
        return not self.activations and not self.groups and len(self.weights) == 4 * len(self.eps) + convs


def dense_block(
    input: Tensor,
    layers: Sequence[LayerWeights],
    *,
    tail: TailWeights | None = None,
    drop_rate: float = 0.0,
    seed: Tensor | None = None,
    memory: MemoryMode = "balanced",
    process_group: str = "",
    active: Sequence[bool] | None = None,
) -> tuple[Tensor, BatchStatistics]:
    """Runs a dense block, and optionally what follows it, on one shared channels-last buffer.

    Layer ``l`` reads the channels ``x_l = [x_0, y_0, ..., y_{l-1}]`` written so far and appends
    ``y_l = dropout(conv2(act2(norm2(conv1(act1(norm1(x_l)))))))``, or without a bottleneck
    ``y_l = dropout(conv2(act1(norm1(x_l))))``. The activations are ReLU unless the layer has others. Statistics are
    computed once per channel, or once per sample and channel where all norms that are not frozen have ``groups``. A
    transition pools before its 1x1 convolution, which gives the same values with a quarter of the work.

    Args:
        input: ``[N, C0, spatial]`` with one to three spatial dimensions; float64, float32, bfloat16 or float16; any
            strides. Under autocast it is cast to the autocast type.
        layers: parameters of the ``L`` layers; an empty sequence runs the tail alone.
        tail: parameters of the transition or norm that reads the whole block, or None.
        drop_rate: probability in [0, 1] that a new feature is dropped.
        seed: ``[]``, int64, on the input's device; required if ``drop_rate > 0``. See :func:`dropout_mask`; the
            layer's number separates the masks.
        memory: "balanced" saves the outputs of conv1 for backward, "min" recomputes them, "recompute" saves the input
            alone and runs the block again. The gradients are the same to the last bit.
        process_group: name of the torch.distributed group that shares batch statistics, as
            :class:`torch.nn.SyncBatchNorm` does; "" for this process alone. All of its processes call the op together.
        active: which layers are computed; None for all. The other layers append zeros. Later layers read these like
            any values: their norms see mean and variance 0.

    Returns:
        The output, its channels innermost in memory, ``[N, C0 + L * k, spatial]`` without a tail or with a norm,
        ``[N, co, spatial // 2]`` with a transition; and the batch statistics ``[C0 + L * k + L * b]``: the buffer's
        channels, then norm2's of every layer; zeros where no norm asks for any. With ``groups`` they are
        ``[N, C0 + L * k + L * b]``.

    Raises:
        ValueError: shapes that do not fit, mixed devices, one value per channel in training, unknown ``memory``;
            ``groups`` that do not divide the channels, or beside norms that take the statistics of the batch.
        TypeError: a dtype that is not floating point, or weights of another dtype than the input's.

    Note:
        Running statistics are not updated: see :func:`update_running_stats_`. Saved for backward: the buffer
        (``C0 + L * k`` numbers per pixel), in "balanced" mode ``b`` more for every active layer, and the statistics,
        which are 0 where a layer is not active; in "recompute" mode the input in the buffer's place. The second run of
        that mode takes no statistics and exchanges nothing with other processes; under torch.compile it is not made,
        and "min" takes its place. Reruns on one machine with one thread count are bit-identical. Double
        backward raises. With a process group, a layer only exchanges the statistics of its ``b`` and ``k`` new channels
        in forward, and as many corrections in backward.

    Reference:
        G. Huang, Z. Liu, L. van der Maaten, K. Weinberger. Densely Connected Convolutional Networks. CVPR 2017,
        arXiv:1608.06993, equation 2; shared memory after G. Pleiss et al., arXiv:1707.06990.
    """
    flat = flatten_block(without_dropped(layers, active), tail)
    return run_flat_block(
        input, flat, flat.weights, drop_rate=drop_rate, seed=seed, memory=memory, process_group=process_group
    )


def run_flat_block(
    input: Tensor,
    flat: FlatBlock,
    weights: Sequence[Tensor | None],
    *,
    drop_rate: float = 0.0,
    seed: Tensor | None = None,
    memory: str = "balanced",
    process_group: str = "",
    contiguous: bool = False,
) -> tuple[Tensor, BatchStatistics]:
    """:func:`dense_block` with its weights in a list: those of ``flat``, or copies of them."""
    check_memory("dense_block", memory, MEMORY_MODES)
    check_input("dense_block", input)
    given = fill_absent(weights, input)
    input = cast_input("dense_block", input, flat.devices, flat.conv_dtypes)
    records = records_gradient(input, given)
    out, _, mean, var, _ = torch.ops.fastdense.dense_block(
        input,
        given,
        flat.eps,
        flat.num_layers,
        flat.bottleneck,
        flat.tail,
        drop_rate,
        seed,
        memory == "balanced" and records,
        process_group,
        contiguous,
        flat.activations,
        flat.numbers,
        flat.groups,
        memory == "recompute" and records and flat.num_layers > 0 and not torch.compiler.is_compiling(),
    )
    return out, BatchStatistics(mean, var)


def without_dropped(layers: Sequence[LayerWeights], active: Sequence[bool] | None) -> Sequence[LayerWeights]:
    if active is None:
        return layers
    if len(active) != len(layers):
        raise ValueError(f"dense_block: expected active to have {len(layers)} entries, got {len(active)}")
    return [layer if on else _dropped(layer) for layer, on in zip(layers, active, strict=True)]


def _dropped(layer: LayerWeights) -> LayerWeights:
    """What stands for a layer that is not computed: convolutions of no channels, no norms."""

    def empty(conv: Tensor) -> Tensor:
        return conv.detach().new_empty([conv.shape[0], 0, *conv.shape[2:]])

    norm = NormWeights(None, None, None, None, 0.0)
    if layer.conv1 is None:
        return LayerWeights(norm, None, None, empty(layer.conv2))
    return LayerWeights(norm, empty(layer.conv1), norm, empty(layer.conv2))


def flatten_block(layers: Sequence[LayerWeights], tail: TailWeights | None) -> FlatBlock:
    parameters, extras = Parameters(), Parameters()
    acts: list[Activation] = []

    def add(norm: NormWeights, act: Activation, conv: Tensor | None, bias: Tensor | None) -> None:
        parameters.norm(norm)
        acts.append(act)
        extras.add(act.weight)
        if conv is not None:
            parameters.conv(conv)
            extras.add(bias)

    for layer in layers:
        if layer.conv1 is not None and layer.norm2 is not None:
            add(layer.norm1, layer.act1, layer.conv1, layer.bias1)
            add(layer.norm2, layer.act2, layer.conv2, layer.bias2)
        else:
            add(layer.norm1, layer.act1, layer.conv2, layer.bias2)
    if tail is not None:
        add(tail.norm, IDENTITY if tail.kind == "norm" else tail.act, tail.conv, tail.bias)
    relu_only = all(act.name == "relu" for act in (acts[:-1] if tail is not None and tail.kind == "norm" else acts))
    has_extras = any(weight is not None for weight in extras.weights)
    return FlatBlock(
        parameters.weights + (extras.weights if has_extras else []),
        parameters.eps,
        len(layers),
        len(layers) > 0 and layers[0].conv1 is not None,
        tail.kind if tail is not None else "none",
        parameters.running,
        list(dict.fromkeys(parameters.devices + extras.devices)),
        parameters.conv_dtypes,
        "" if relu_only else ",".join(act.name for act in acts),
        [] if relu_only else [number for act in acts for number in (act.first, act.second)],
        parameters.groups if any(parameters.groups) else [],
    )


def out_sizes(input: Tensor, weights: Sequence[Tensor], num_layers: int, bottleneck: bool, tail: str) -> list[int]:
    """The shape of what the native operators return."""
    stride = 10 if bottleneck else 5
    batch, channels, *spatial = input.shape
    if tail == "transition":
        return [batch, weights[num_layers * stride + 4].shape[0], *(size // 2 for size in spatial)]
    return [batch, channels + (num_layers * weights[stride - 1].shape[0] if num_layers else 0), *spatial]


@register_fake("dense_block")
def _(
    input: Tensor,
    weights: Sequence[Tensor],
    eps: Sequence[float],
    num_layers: int,
    bottleneck: bool,
    tail: str,
    drop_rate: float,
    seed: Tensor | None,
    keep_bottleneck: bool,
    process_group: str,
    contiguous: bool = False,
    activations: str = "",
    activation_parameters: Sequence[float] = (),
    groups: Sequence[int] = (),
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    stride = 10 if bottleneck else 5
    width = weights[4].shape[0] if num_layers and bottleneck else 0
    buffer = empty_channels_last(input, out_sizes(input, weights, num_layers, bottleneck, "none"))
    statistics = buffer.shape[1] + num_layers * width
    mean = input.new_empty([input.shape[0], statistics] if groups else [statistics], dtype=statistics_dtype(input))
    active = sum(1 for layer in range(num_layers) if weights[stride * layer + stride - 1].shape[1] != 0)
    kept = active if keep_bottleneck and bottleneck else 0
    z = input.new_empty([kept, count_pixels(input), width])
    out = buffer if tail == "none" else torch.empty_like(buffer)
    if tail == "transition":
        out = empty_channels_last(input, out_sizes(input, weights, num_layers, bottleneck, tail))
    if contiguous:
        out = out.contiguous()
    return out, input.new_empty([0]) if tail == "none" else buffer, mean, torch.empty_like(mean), z


@register_fake("_dense_block_backward")
def _(
    grad_output: Tensor,
    buffer: Tensor,
    mean: Tensor,
    var: Tensor,
    z: Tensor,
    weights: Sequence[Tensor],
    eps: Sequence[float],
    num_layers: int,
    bottleneck: bool,
    tail: str,
    drop_rate: float,
    seed: Tensor | None,
    in_channels: int,
    needs_grad: Sequence[bool],
    process_group: str,
    activations: str = "",
    activation_parameters: Sequence[float] = (),
    groups: Sequence[int] = (),
) -> list[Tensor]:
    return fake_gradients(buffer.narrow(1, 0, in_channels), weights, needs_grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, weights, eps, num_layers, bottleneck, tail, drop_rate, seed, _, process_group, *rest = inputs
    out, buffer, mean, var, z = output
    # The dispatcher leaves out what is as by default at the end of the arguments.
    defaults: tuple[Any, ...] = (False, "", [], [], False)
    _, *behind, ctx.recompute = (*rest, *defaults[len(rest) :])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, var)
    # The buffer, or what has the same numbers and somebody else keeps as well.
    features = input if num_layers == 0 or ctx.recompute else out if tail == "none" else buffer
    save(ctx, features, mean, var, z, seed, *weights)
    ctx.arguments = (eps, num_layers, bottleneck, tail, drop_rate)
    ctx.in_channels = input.shape[1]
    ctx.last_arguments = (process_group, *behind)


def _run_again(ctx: Any, input: Tensor, mean: Tensor, var: Tensor, seed: Tensor | None, given: list[Tensor]) -> Tensor:
    """The buffer, from the block's input, by the batch statistics that its first run took.

    Statistics of single samples are taken again: they move nothing, and no other process shares them.
    """
    eps, num_layers, bottleneck, tail, drop_rate = ctx.arguments
    _, names, numbers, groups = ctx.last_arguments
    per_layer, conv2, norms = (10, 9, 2 * num_layers) if bottleneck else (5, 4, num_layers)
    weights, growth, begin = given[: num_layers * per_layer], given[conv2].shape[0], input.shape[1]
    second = begin + num_layers * growth  # of the statistics: those of the first layer's norm2
    width = weights[4].shape[0] if bottleneck else 0
    for layer in range(num_layers):
        at = layer * per_layer
        if groups or weights[at + conv2].shape[1] == 0:  # it is not active
            continue
        fix_statistics(weights, at, mean, var, 0, begin + layer * growth)
        if bottleneck:
            fix_statistics(weights, at + 5, mean, var, second + layer * width, width)
    extras = num_layers * per_layer + {"none": 0, "transition": 5}.get(tail, 4)
    weights += given[extras : extras + 2 * norms]
    how = (eps[:norms], num_layers, bottleneck, "none", drop_rate, seed, False, "", False)
    behind = (",".join(names.split(",")[:norms]), numbers[: 2 * norms], groups[:norms], True)
    return run_again(torch.ops.fastdense.dense_block, input, weights, *how, *behind)[0]


def _backward(ctx: Any, needs: Sequence[bool], grad_output: Tensor | None, *_: Tensor | None) -> list[Tensor | None]:
    if grad_output is None:
        return [None] * len(needs)
    features, mean, var, z, seed, *weights = saved(ctx)
    buffer = _run_again(ctx, features, mean, var, seed, weights) if ctx.recompute else features
    needs_grad = needs[:-1]  # the last is the seed's
    grads = torch.ops.fastdense._dense_block_backward(
        grad_output,
        buffer,
        mean,
        var,
        z,
        weights,
        *ctx.arguments,
        seed,
        ctx.in_channels,
        needs_grad,
        *ctx.last_arguments,
    )
    return [*wanted(grads, needs_grad), None]


register_autograd("dense_block", _backward, setup_context=_setup_context)
register_autograd("_dense_block_backward", no_double_backward("dense_block"))

# SPDX-License-Identifier: Apache-2.0
"""What every native operator returns, from its flat arguments, by the reference in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdense import _C, reference
from fastdense.ops import (
    Activation,
    ConvWeights,
    DualPathWeights,
    LayerWeights,
    NormWeights,
    ProjectionWeights,
    TailWeights,
)
from tests.cases import highway_gate

Results = list[Tensor | None]  # None: not compared


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    return [_double(v) for v in value] if isinstance(value, list) else value


def _given(t: Tensor) -> Tensor | None:
    return t if t.numel() > 0 else None


def _norm(tensors: Sequence[Tensor], eps: float, groups: int = 0) -> NormWeights:
    weight, bias, mean, var = map(_given, tensors)  # the last two have no gradient
    # torch trains with no eps of 0
    running = (None if t is None else t.detach() for t in (mean, var))
    return NormWeights(weight, bias, *running, eps or 1e-300, groups)


class _Reader:
    """Takes norms and convolutions from flat lists in order."""

    def __init__(self, weights: Sequence[Tensor], eps: Sequence[float], groups: Sequence[int] = ()) -> None:
        self.weights, self.eps, self.groups = iter(weights), iter(eps), iter(groups)

    def norm(self) -> NormWeights:
        return _norm([next(self.weights) for _ in range(4)], next(self.eps), next(self.groups, 0))

    def conv(self) -> Tensor:
        return next(self.weights)


def _dense_block(
    input,
    weights,
    eps,
    num_layers,
    bottleneck,
    tail,
    drop_rate,
    seed,
    keep_bottleneck,
    process_group,
    contiguous=False,
    activations="",
    activation_parameters=(),
    groups=(),
    recompute=False,
) -> Results:
    reader = _Reader(weights, eps, groups)
    layers = []
    for _ in range(num_layers):
        norm1, first = reader.norm(), reader.conv()
        layers.append(
            LayerWeights(norm1, first, reader.norm(), reader.conv())
            if bottleneck
            else LayerWeights(norm1, None, None, first)
        )
    read_by = None
    if tail != "none":
        read_by = TailWeights(reader.norm(), reader.conv() if tail == "transition" else None, tail != "norm")
    extras, numbers = reader.weights, iter(activation_parameters)
    names = iter(activations.split(",") if activations else ["relu"] * len(eps))

    def act() -> Activation:
        return Activation(next(names), next(numbers, 0.0), next(numbers, 0.0), _given(next(extras, torch.empty(0))))

    def bias() -> Tensor | None:
        return _given(next(extras, torch.empty(0)))

    for index, layer in enumerate(layers):
        if bottleneck:
            act1, bias1, act2, bias2 = act(), bias(), act(), bias()
            layers[index] = layer._replace(act1=act1, bias1=bias1, act2=act2, bias2=bias2)
        else:
            layers[index] = layer._replace(act1=act(), bias2=bias())
    if read_by is not None:
        read_by = read_by._replace(act=act(), bias=bias())
    active = [layer.conv2.shape[1] != 0 for layer in layers]
    out, _ = reference.dense_block(input, layers, tail=read_by, drop_rate=drop_rate, seed=seed, active=active)
    return [out, None, None, None, None]


def _dense_block_inference(input, weights, eps, num_layers, bottleneck, tail, packed, contiguous=False) -> Results:
    return _dense_block(input, weights, eps, num_layers, bottleneck, tail, 0.0, None, False, "")[:1]


def _pack_dense_block(weights, eps, in_channels, num_layers, bottleneck, tail) -> Results:
    """Panels are as the processor wants them; scale and shift of norm1, and the shift of norm2, are numbers."""
    reader, numbers, sizes = _Reader(weights, eps), [], []

    def coefficients(channels: int) -> Tensor:
        norm = reader.norm()
        ones = torch.ones(channels, dtype=torch.float64)
        scale = (ones if norm.weight is None else norm.weight) / (norm.running_var + norm.eps).sqrt()
        shift = (0 * ones if norm.bias is None else norm.bias) - norm.running_mean * scale
        return torch.stack([scale, shift])

    for _ in range(num_layers):
        channels = in_channels + sum(sizes)
        scale_and_shift, first = coefficients(channels), reader.conv()
        numbers += [scale_and_shift, coefficients(first.shape[0])[1]] if bottleneck else [scale_and_shift]
        sizes.append((reader.conv() if bottleneck else first).shape[0])
    if tail != "none":
        numbers.append(coefficients(in_channels + sum(sizes)))
    return [None, torch.cat([n.flatten() for n in numbers]), None]


def _dual_path_stage(
    input, weights, eps, num_blocks, projection, residual_channels, stride, memory, process_group, contiguous=False
) -> Results:
    reader = _Reader(weights, eps)
    split = ProjectionWeights(reader.norm(), reader.conv()) if projection else None
    blocks = []
    for _ in range(num_blocks):
        norm_a, conv_a, norm_b, conv_b, norm_c, conv_c = (
            part() for _ in range(3) for part in (reader.norm, reader.conv)
        )
        blocks.append(DualPathWeights(norm_a, conv_a, norm_b, conv_b, norm_c, conv_c))
    stride = min(stride, max(1, *input.shape[2:]))  # of which torch takes no arbitrary ones
    out, _ = reference.dual_path_stage(
        input, blocks, residual_channels=residual_channels, projection=split, stride=stride
    )
    return [out, None, None, None, None, None]


def _dual_path_stage_inference(input, weights, eps, *arguments) -> Results:
    *options, _packed, _contiguous = arguments
    return _dual_path_stage(input, weights, eps, *options, "nothing", "")[:1]


def _pack_dual_path_stage(weights, eps, in_channels, num_blocks, projection, residual_channels, stride) -> Results:
    """Panels are as the processor wants them; scale, shift, mean and 1 / deviation of the norms are numbers."""
    reader, packed = _Reader(weights, eps), [None]
    for _ in range(3 * num_blocks + projection):
        norm, conv = reader.norm(), reader.conv()
        del conv
        rstd = 1 / (norm.running_var + norm.eps).sqrt()
        scale = rstd if norm.weight is None else norm.weight * rstd
        shift = (0 * rstd if norm.bias is None else norm.bias) - norm.running_mean * scale
        packed += [torch.stack([scale, shift, norm.running_mean, rstd])[None], None]
    return packed


def _residual_dense_block(
    input, weights, first_channels, fusion, negative_slope, scale, outer, outer_scale, *_layout_and_mode
) -> Results:
    convs = [ConvWeights(weight, _given(bias)) for weight, bias in zip(weights[::2], weights[1::2], strict=True)]
    layers, last = (convs[:-1], convs[-1]) if fusion else (convs, None)
    options = {"negative_slope": negative_slope, "scale": scale, "first_channels": first_channels}
    return [reference.residual_dense_block(input, layers, last, outer=outer, outer_scale=outer_scale, **options), None]


def _norm_relu_max_pool(input, norm, eps, kernel_size, stride, padding, keep_winners, process_group) -> Results:
    stride = [min(s, size + 2 * p) for s, size, p in zip(stride, input.shape[2:], padding, strict=True)]
    return [reference.norm_relu_max_pool(input, _norm(norm, eps), kernel_size, stride, padding)[0], None, None, None]


def _bicubic(input, size, step, a, antialias, border, align_corners, residual, low, high) -> Results:
    out = reference.bicubic(input, size, step, a, antialias, border, align_corners)
    return [(out if residual is None else out + residual).clamp(low, high)]


def _bicubic_backward(grad_output, size, *options) -> Results:
    x = grad_output.new_zeros(*grad_output.shape[:2], *size)
    return _gradients(lambda x: reference.bicubic(x, grad_output.shape[2:], *options), grad_output, [x], [True])


def _bicubic_uint8(input, size, step, a, antialias, border, align_corners, rounding) -> Results:
    return [reference.bicubic(input.double(), size, step, a, antialias, border, align_corners).clamp(0, 255)]


def _highway_gate(input, projection, activation) -> Results:
    return [highway_gate.reference(input, projection, activation)]


def _mean_join(inputs) -> Results:
    return [reference.mean_join(inputs)]


def _dual_path_merge(input, features, residual_channels) -> Results:
    r = residual_channels
    return [torch.cat([input[:, :r] + features[:, :r], input[:, r:], features[:, r:]], 1)]


def _dual_path_split(input, channels, residual_channels) -> Results:
    return [input[:, :channels], torch.cat([input[:, :residual_channels], input[:, channels:]], 1)]


def _dropout_mask(seed, layer, rows, channels, drop_rate) -> Results:
    key, threshold = seed.item(), _C.scalar.dropout_threshold(drop_rate)
    keeps = [_C.scalar.dropout_keep(key % 2**64, layer, at, threshold) for at in range(rows * channels)]
    return [torch.tensor(keeps, dtype=torch.bool).view(rows, channels)]


def _update_running_stats(
    running_mean, running_var, num_batches_tracked, mean, var, offsets, momentum, count, total_count
) -> Results:
    """The tensors that it writes."""
    values = count if total_count is None else total_count.item()
    moved: Results = []
    for running, batch, factor in ((running_mean, mean, 1.0), (running_var, var, values / (values - 1))):
        for old, tracked, at, share in zip(running, num_batches_tracked, offsets, momentum, strict=True):
            share = 1 / (tracked.item() + 1) if share < 0 else share
            new = old + share * (batch[at : at + len(old)] * factor - old)
            moved.append(new if values > 0 else old)
    return [*moved, *(tracked + 1 for tracked in num_batches_tracked)]


def _gradients(run: Callable[..., Tensor], grad: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool]) -> Results:
    """By autograd; None where no gradient is wanted, or there is none."""
    leaves = [
        t.detach().requires_grad_(needed and t.is_floating_point()) for t, needed in zip(tensors, needs, strict=True)
    ]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    with torch.enable_grad():
        grads = iter(torch.autograd.grad(run(*leaves), wanted, grad, allow_unused=True) if wanted else [])
    return [next(grads) if leaf.requires_grad else None for leaf in leaves]


def _dense_block_backward(grad_output, buffer, mean, var, z, weights, *options) -> Results:
    rest, (in_channels, needs, group, *activations) = options[:6], options[6:]
    input = buffer[:, :in_channels]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return _dense_block(x, parameters, *rest, False, group, False, *activations)[0]

    return _gradients(run, grad_output, [input, *weights], needs)


def _dual_path_stage_backward(grad_output, input, out, residuals, a, b, mean, var, weights, *options) -> Results:
    *rest, needs, group = options

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return _dual_path_stage(x, parameters, *rest, "min", group)[0]

    return _gradients(run, grad_output, [input, *weights], needs)


def _residual_dense_block_backward(
    grad_output, buffer, weights, first_channels, fusion, slope, scale, outer_scale, in_channels, needs
) -> Results:
    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        outer = torch.zeros_like(x) if fusion else None
        return _residual_dense_block(x, parameters, first_channels, fusion, slope, scale, outer, outer_scale)[0]

    return _gradients(run, grad_output, [buffer[:, :in_channels], *weights], needs)


def _norm_relu_max_pool_backward(grad_output, input, winners, mean, var, norm, *options) -> Results:
    *rest, needs, group = options

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return _norm_relu_max_pool(x, parameters, *rest, True, group)[0]

    return _gradients(run, grad_output, [input, *norm], needs)


def _highway_gate_backward(grad_output, input, projection, activation) -> Results:
    return _gradients(
        lambda x, p: highway_gate.reference(x, p, activation), grad_output, [input, projection], [True, True]
    )


_ORACLES: dict[str, Callable[..., Results]] = {
    "dense_block": _dense_block,
    "_dense_block_backward": _dense_block_backward,
    "dense_block_inference": _dense_block_inference,
    "pack_dense_block": _pack_dense_block,
    "dual_path_stage": _dual_path_stage,
    "_dual_path_stage_backward": _dual_path_stage_backward,
    "dual_path_stage_inference": _dual_path_stage_inference,
    "pack_dual_path_stage": _pack_dual_path_stage,
    "residual_dense_block": _residual_dense_block,
    "_residual_dense_block_backward": _residual_dense_block_backward,
    "norm_relu_max_pool": _norm_relu_max_pool,
    "_norm_relu_max_pool_backward": _norm_relu_max_pool_backward,
    "bicubic": _bicubic,
    "_bicubic_backward": _bicubic_backward,
    "bicubic_uint8": _bicubic_uint8,
    "highway_gate": _highway_gate,
    "_highway_gate_backward": _highway_gate_backward,
    "mean_join": _mean_join,
    "dual_path_merge": _dual_path_merge,
    "dual_path_split": _dual_path_split,
    "dropout_mask": _dropout_mask,
    "update_running_stats_": _update_running_stats,
}


def expected(name: str, arguments: Sequence[Any]) -> Results:
    """Results of the operator for valid arguments; those of update_running_stats_ are what it writes."""
    return _ORACLES[name](*_double(list(arguments)))

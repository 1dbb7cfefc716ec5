# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch versions of the operators: slow, obvious, differentiable by autograd. The only oracle of the tests."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdense.ops.activation import Activation
from fastdense.ops.arguments import BatchStatistics, NormWeights
from fastdense.ops.dense_block import LayerWeights, TailWeights
from fastdense.ops.dropout_mask import dropout_mask
from fastdense.ops.dual_path import DualPathWeights, ProjectionWeights
from fastdense.ops.residual_dense_block import ConvWeights

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_AVG_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_MAX_POOL: tuple[Callable[..., Tensor], ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


def _conv(x: Tensor, weight: Tensor, stride: int = 1, bias: Tensor | None = None) -> Tensor:
    padding = [size // 2 for size in weight.shape[2:]]
    return _CONV[x.dim() - 3](x, weight, bias, stride, padding, 1, x.shape[1] // weight.shape[1])


def _norm(x: Tensor, norm: NormWeights) -> Tensor:
    if norm.groups > 0 and norm.running_mean is None:
        return F.group_norm(x, norm.groups, norm.weight, norm.bias, norm.eps)
    batch_statistics = norm.running_mean is None
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, batch_statistics, 0.0, norm.eps)


def activate(x: Tensor, act: Activation) -> Tensor:
    """The functions of torch with the names of :class:`fastdense.ops.Activation`."""
    with_numbers: dict[str, Callable[..., Tensor]] = {
        "leaky_relu": lambda: F.leaky_relu(x, act.first),
        "elu": lambda: F.elu(x, act.first),
        "celu": lambda: F.celu(x, act.first),
        "softplus": lambda: F.softplus(x, act.first, act.second),
        "gelu_tanh": lambda: F.gelu(x, approximate="tanh"),
        "prelu": lambda: F.prelu(x, x.new_empty(0) if act.weight is None else act.weight),
        "identity": lambda: x,
    }
    if act.name in with_numbers:
        return with_numbers[act.name]()
    plain: Callable[[Tensor], Tensor] = getattr(F, act.name)
    return plain(x)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``[C]`` of ``[N, C, spatial]``."""
    dims = [d for d in range(x.dim()) if d != 1]
    return x.mean(dims), x.var(dims, correction=0)


def sample_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same ``[N, C]`` of every sample."""
    rows = x.flatten(2)
    return rows.mean(2), rows.var(2, correction=0)


def dropout_factors(seed: Tensor, layer: int, drop_rate: float, like: Tensor) -> Tensor:
    """The factors 0 or ``1 / (1 - drop_rate)`` for new features ``[N, k, spatial]``."""
    rows = like.numel() // like.shape[1]
    keep = dropout_mask(seed, layer, rows, like.shape[1], drop_rate)
    keep = keep.view(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)
    scale = 1 / (1 - drop_rate) if drop_rate < 1 else 0.0
    return keep.to(like.dtype) * scale


def dense_layer(x: Tensor, layer: LayerWeights) -> tuple[Tensor, Tensor | None]:
    """New features of one layer before dropout, and the bottleneck's output."""
    y = activate(_norm(x, layer.norm1), layer.act1)
    z = None
    if layer.conv1 is not None and layer.norm2 is not None:
        z = _conv(y, layer.conv1, bias=layer.bias1)
        y = activate(_norm(z, layer.norm2), layer.act2)
    return _conv(y, layer.conv2, bias=layer.bias2), z


def dense_block(
    input: Tensor,
    layers: Sequence[LayerWeights],
    *,
    tail: TailWeights | None = None,
    drop_rate: float = 0.0,
    seed: Tensor | None = None,
    active: Sequence[bool] | None = None,
) -> tuple[Tensor, BatchStatistics]:
    """:func:`fastdense.ops.dense_block` by concatenation; the transition convolves first, then pools."""
    features = [input]
    bottlenecks = []
    for index, layer in enumerate(layers):
        if active is not None and not active[index]:
            features.append(input.new_zeros(input.shape[0], layer.conv2.shape[0], *input.shape[2:]))
            bottlenecks += [] if layer.conv1 is None else [input.new_zeros(input.shape[0], layer.conv1.shape[0], 1)]
            continue
        new, z = dense_layer(torch.cat(features, 1), layer)
        if drop_rate > 0:
            assert seed is not None
            new = new * dropout_factors(seed, index, drop_rate, new)
        features.append(new)
        bottlenecks += [z] if z is not None else []
    out = torch.cat(features, 1)
    norms = [norm for layer in layers for norm in (layer.norm1, layer.norm2)] + ([tail.norm] if tail else [])
    per_sample = any(norm is not None and norm.groups > 0 and norm.running_mean is None for norm in norms)
    means, variances = zip(
        *map(sample_statistics if per_sample else batch_statistics, [out, *bottlenecks]), strict=True
    )
    statistics = BatchStatistics(torch.cat(means, -1).detach(), torch.cat(variances, -1).detach())
    if tail is not None:
        out = _norm(out, tail.norm)
        out = activate(out, tail.act) if tail.kind != "norm" else out
        if tail.conv is not None:
            out = _AVG_POOL[out.dim() - 3](_conv(out, tail.conv, bias=tail.bias), 2)
    return out, statistics


def residual_dense_block(
    input: Tensor,
    layers: Sequence[ConvWeights],
    fusion: ConvWeights | None,
    *,
    negative_slope: float = 0.2,
    scale: float = 1.0,
    outer: Tensor | None = None,
    outer_scale: float = 1.0,
    first_channels: Sequence[int] | None = None,
) -> Tensor:
    """:func:`fastdense.ops.residual_dense_block` by concatenation."""
    features = [input]
    for layer, first in zip(layers, first_channels or [0] * len(layers), strict=True):
        new = F.conv2d(torch.cat(features, 1)[:, first:], layer.weight, layer.bias, padding=1)
        features.append(F.leaky_relu(new, negative_slope))
    if fusion is None:
        return torch.cat(features, 1)
    out = F.conv2d(torch.cat(features, 1), fusion.weight, fusion.bias, padding=fusion.weight.shape[-1] // 2)
    out = out * scale + input
    return out if outer is None else out * outer_scale + outer


def dual_path_stage(
    input: Tensor,
    blocks: Sequence[DualPathWeights],
    *,
    residual_channels: int,
    projection: ProjectionWeights | None = None,
    stride: int = 1,
) -> tuple[Tensor, BatchStatistics]:
    """:func:`fastdense.ops.dual_path_stage` by concatenation."""
    read: list[Tensor] = []  # by the norms

    def norm_relu(x: Tensor, norm: NormWeights) -> Tensor:
        read.append(x)
        return F.relu(_norm(x, norm))

    x = start = input
    if projection is not None:
        start = _conv(norm_relu(input, projection.norm), projection.conv, stride)
    residual, dense = start[:, :residual_channels], start[:, residual_channels:]
    for index, block in enumerate(blocks):
        z = _conv(norm_relu(x, block.norm_a), block.conv_a)
        z = _conv(norm_relu(z, block.norm_b), block.conv_b, stride if index == 0 else 1)
        z = _conv(norm_relu(z, block.norm_c), block.conv_c)
        residual = residual + z[:, :residual_channels]
        dense = torch.cat([dense, z[:, residual_channels:]], 1)
        x = torch.cat([residual, dense], 1)
    means, variances = zip(*map(batch_statistics, read), strict=True)
    return x, BatchStatistics(torch.cat(means).detach(), torch.cat(variances).detach())


def norm_relu_max_pool(
    input: Tensor, norm: NormWeights, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, BatchStatistics]:
    """:func:`fastdense.ops.norm_relu_max_pool` step by step."""
    out = _MAX_POOL[input.dim() - 3](F.relu(_norm(input, norm)), kernel_size, stride, padding)
    mean, var = batch_statistics(input) if norm.running_mean is None else (norm.running_mean * 0, norm.running_mean * 0)
    return out, BatchStatistics(mean.detach(), var.detach())


def mean_join(inputs: Sequence[Tensor]) -> Tensor:
    """:func:`fastdense.ops.mean_join` by stacking."""
    return torch.stack(list(inputs)).mean(0)


def bicubic_matrix(n: int, m: int, step: float, a: float, antialias: bool, border: str, align_corners: bool) -> Tensor:
    """``[m, n]``, float64: what a resampled axis is multiplied by; see :func:`fastdense.bicubic_resize`."""
    out = torch.arange(m, dtype=torch.float64)
    u = out * step if align_corners and not antialias else (out + 0.5) * step - 0.5
    stretch = max(step, 1.0) if antialias else 1.0
    reach = int(2 * stretch) + 2
    taps = u.floor()[:, None] + torch.arange(-reach, reach + 1, dtype=torch.float64)
    x = ((u[:, None] - taps) / stretch).abs()
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    weights = torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
    index = taps.long()
    if border == "clamp":
        index = index.clamp(0, n - 1)
    elif border == "symmetric":
        index = index % (2 * n)
        index = torch.where(index < n, index, 2 * n - 1 - index)
    inside = (index >= 0) & (index < n)
    matrix = torch.zeros(m, n, dtype=torch.float64)
    matrix.scatter_add_(1, index.clamp(0, n - 1), torch.where(inside, weights, 0.0))
    return matrix / matrix.sum(1, keepdim=True) if border != "clamp" or antialias else matrix


def bicubic(
    input: Tensor, size: Sequence[int], step: Sequence[float], a: float, antialias: bool, border: str, corners: bool
) -> Tensor:
    """Resamples every spatial axis by a dense matrix product."""
    out = input
    for axis, (m, width) in enumerate(zip(size, step, strict=True), start=2):
        matrix = bicubic_matrix(input.shape[axis], m, width, a, antialias, border, corners).to(input)
        out = torch.tensordot(out, matrix, dims=([axis], [1])).movedim(-1, axis)
    return out

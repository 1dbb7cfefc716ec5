# SPDX-License-Identifier: Apache-2.0
"""Arguments that the block operators share: norms, lists of parameters, devices and types."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdense._extension import _C
from fastdense.ops import cpu_build

_DEVICES = ("cpu", "meta")
_WITH_CUDA = ("dense_block", "dual_path_stage", "norm_relu_max_pool", "residual_dense_block")
_CUDA_OPERATORS = _WITH_CUDA if _C.build_info()["cuda"] else ()


def is_exporting() -> bool:
    """``torch.compiler.is_exporting()``, which is true in all that the compiler of torch 2.11 traces."""
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def devices(op: str) -> tuple[str, ...]:
    """The device types on whose tensors this build runs a block operator."""
    return (*_DEVICES, "cuda") if op in _CUDA_OPERATORS else _DEVICES


def missing_kernels(device: str) -> str:
    """Why an operator does not run on a device that is not among its :func:`devices`."""
    if device == "cuda" and _C.build_info()["cuda"] is None:
        return cpu_build.HINT
    return f"this build has no kernels for {device} tensors"


class NormWeights(NamedTuple):
    """A norm over ``C`` channels.

    ``running_mean`` and ``running_var`` are given when the norm uses them to normalise (eval mode, frozen) and None
    when it uses the statistics of its input; ``weight`` and ``bias`` are None without an affine map. All are ``[C]``.

    ``groups`` is 0 for a batch norm. Else, each sample has statistics of its own, which so many groups of channels
    share: as many as channels for an instance norm. Only the dense block has such norms.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float
    groups: int = 0


class PackedWeights(NamedTuple):
    """Weights as an operator for inference takes them, and what was made of them once.

    Panels are as this processor's instructions want them: they are never stored.
    """

    weights: list[Tensor]
    tensors: list[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


class BatchStatistics(NamedTuple):
    """Mean and biased variance of the channels that an operator's norms read, in the operator's order.

    ``[S]``, or ``[N, S]`` of every sample where norms take those.
    """

    mean: Tensor
    var: Tensor


class Parameters:
    """Flat lists in the order in which a native operator reads them (csrc/core/weights.h).

    ``weights`` has None for what a norm or a convolution does not have, see :func:`fill_absent`; ``running`` lists
    the positions of running statistics, ``devices`` where all are, ``conv_dtypes`` what the convolutions are;
    ``groups`` has those of each norm, 0 for frozen ones.
    """

    def __init__(self) -> None:
        self.weights: list[Tensor | None] = []
        self.eps: list[float] = []
        self.groups: list[int] = []
        self.running: list[int] = []
        self.devices: list[torch.device] = []
        self.conv_dtypes: list[torch.dtype] = []

    def norm(self, norm: NormWeights) -> None:
        at = len(self.weights) + 2
        self.running += [at, at + 1] if norm.running_mean is not None else []
        for weight in norm[:4]:
            self.add(weight)
        self.eps.append(norm.eps)
        self.groups.append(norm.groups if norm.running_mean is None else 0)

    def conv(self, weight: Tensor) -> None:
        if weight.dtype not in self.conv_dtypes:
            self.conv_dtypes.append(weight.dtype)
        self.add(weight)

    def biased_conv(self, weight: Tensor, bias: Tensor | None) -> None:
        self.conv(weight)
        self.add(bias)

    def add(self, weight: Tensor | None) -> None:
        if weight is not None and weight.device not in self.devices:
            self.devices.append(weight.device)
        self.weights.append(weight)


def copy_running(weights: list[Tensor | None], running: Sequence[int]) -> list[Tensor | None]:
    """Copies of running statistics where a backward pass may come: a training step in between moves the buffers."""
    if not running or not torch.is_grad_enabled():
        return weights
    copies = list(weights)
    for at in running:
        copies[at] = copies[at].clone()  # type: ignore[union-attr]
    return copies


def fix_statistics(weights: list[Tensor], norm: int, mean: Tensor, var: Tensor, first: int, channels: int) -> None:
    """Lets a norm that took the statistics of its batch use them again, as a frozen norm uses running ones.

    Args:
        weights: of an operator; changed.
        norm: the position of the norm's first tensor.
        mean: of the operator's batch statistics.
        var: likewise.
        first: where those of the norm begin.
        channels: of the norm.
    """
    if weights[norm + 2].numel() == 0:
        weights[norm + 2 : norm + 4] = mean[first : first + channels], var[first : first + channels]


def fill_absent(weights: Sequence[Tensor | None], input: Tensor) -> list[Tensor]:
    """Empty tensors in the place of None: lists with None are not differentiable in custom operators."""
    absent = input.detach().new_empty(0)
    return [absent if weight is None else weight for weight in weights]


def check_memory(op: str, memory: str, modes: Sequence[str]) -> str:
    if memory not in modes:
        raise ValueError(f"{op}: expected memory to be one of {tuple(modes)}, got {memory!r}")
    return memory


def check_input(op: str, input: Tensor) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: expected input to be a tensor, got {type(input).__name__}")
    if input.device.type not in devices(op):
        raise NotImplementedError(
            f"{op}: expected input to be on one of {devices(op)}, got {input.device.type}: "
            f"{missing_kernels(input.device.type)}"
        )


def check_batch_norms(op: str, groups: Sequence[int]) -> None:
    if any(groups):
        raise ValueError(f"{op}: expected batch norms, groups 0, got {next(filter(None, groups))}")


def cast_input(op: str, input: Tensor, devices: Sequence[torch.device], conv_dtypes: Sequence[torch.dtype]) -> Tensor:
    """The input in the type to compute in: under autocast that of autocast, else that of the convolutions."""
    for place in devices:
        if place != input.device:
            raise ValueError(f"{op}: expected all weights to be on {input.device} like input, got {place}")
    device = input.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        if input.dtype in (torch.float32, torch.float16, torch.bfloat16):
            return input.to(torch.get_autocast_dtype(device))
        return input
    for dtype in conv_dtypes:
        if dtype != input.dtype:
            raise TypeError(f"{op}: expected input to be {dtype} like the convolution weights, got {input.dtype}")
    return input


def records_gradient(input: Tensor, weights: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and (input.requires_grad or any(w.requires_grad for w in weights))


def statistics_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def empty_channels_last(like: Tensor, sizes: Sequence[int]) -> Tensor:
    """As the native allocation of csrc/core/layout.h."""
    strides = [1] * len(sizes)
    stride = sizes[1]
    for d in range(len(sizes) - 1, 1, -1):
        strides[d] = stride
        stride = stride * sizes[d]
    strides[0] = stride
    return like.new_empty_strided(sizes, strides)


def empty_in_layout(like: Tensor, sizes: Sequence[int]) -> Tensor:
    """Channels innermost in memory if those of ``like`` are, else contiguous: `Layout` of csrc/core/layout.h."""
    if like.is_contiguous() or not like.movedim(1, -1).is_contiguous():
        return like.new_empty(sizes)
    return empty_channels_last(like, sizes)


def empty_like_layout(like: Tensor, channels: int) -> Tensor:
    """The same with another number of channels."""
    batch, _, *spatial = like.shape
    return empty_in_layout(like, [batch, channels, *spatial])


def count_pixels(x: Tensor) -> int:
    pixels = x.shape[0]
    for size in x.shape[2:]:
        pixels = pixels * size
    return pixels


def fake_gradients(input: Tensor, weights: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor]:
    """What a native backward returns: empty tensors where no gradient is wanted."""
    absent = input.new_empty([0])
    grads = [empty_channels_last(input, input.shape) if needs_grad[0] else absent]
    for weight, needed in zip(weights, needs_grad[1:], strict=True):
        grads.append(torch.empty_like(weight) if needed else input.new_empty([0]))
    return grads

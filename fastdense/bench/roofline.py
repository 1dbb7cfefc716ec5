# SPDX-License-Identifier: Apache-2.0
"""The least time that a training step of a DenseNet can take on a GPU: a model, not a measurement.

Every kernel costs the longer of its compulsory memory traffic at the rate of a large copy and its arithmetic at the
rate of a large product; a step is the sum. Each input is read once and each output written once; weights, vectors of
channels, launches and what a cache saves between kernels are left out, except that the activated prefix of fastdense
stays in the L2 cache. Symbols, per pixel: ``c`` channels of the prefix, ``b`` of the bottleneck, ``k`` of a layer.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

from fastdense.bench.nets import Net, Variant


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the GPU reaches: bytes a second of a copy, read and write, and operations a second of a product."""

    bytes_per_second: float
    flops_per_second: float


@dataclasses.dataclass
class Roofline:
    """Traffic in bytes, operations and seconds of a step."""

    ceilings: Ceilings
    element_size: int
    bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    def kernel(self, pixels: float, elements: float, flops: float = 0.0) -> None:
        """Adds a kernel that moves so many elements and computes so much for every pixel."""
        moved, computed = pixels * elements * self.element_size, pixels * flops
        self.bytes += moved
        self.flops += computed
        self.seconds += max(moved / self.ceilings.bytes_per_second, computed / self.ceilings.flops_per_second)


# Name of a net: growth rate, channels of the stem, layers of each block.
_NETS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "densenet121": (32, 64, (6, 12, 24, 16)),
    "densenet161": (48, 96, (6, 12, 36, 24)),
    "densenet169": (32, 64, (6, 12, 32, 32)),
    "densenet201": (32, 64, (6, 12, 48, 32)),
    "densenet264": (32, 64, (6, 12, 64, 48)),
}


def training_roofline(
    net: Net, variant: Variant, batch: int, size: int, element_size: int, ceilings: Ceilings, tensor_cores: bool = False
) -> Roofline | None:
    """The floor of a training step, or None for a network or variant that the model does not know.

    Args:
        tensor_cores: whether fastdense's layers run by its fused kernels instead of the library's products.
    """
    blocks: tuple[int, ...]
    if net.is_cifar and net.bottleneck and net.compression == 0.5:
        growth, stem, blocks = net.growth_rate, 2 * net.growth_rate, ((net.depth - 4) // 6,) * 3
    elif net.name in _NETS:
        growth, stem, blocks = _NETS[net.name]
    else:
        return None
    if variant.memory_efficient or variant.compile:
        return None
    floor = Roofline(ceilings, element_size)
    channels, side = stem, size
    if net.is_cifar:
        _stem(floor, batch * size * size, 3, channels, 9)
    else:
        _pooled_stem(floor, batch, size, channels)
        side = size // 4
    for i, layers in enumerate(blocks):
        pixels = batch * side * side
        layer = _plain_layer if variant.memory is None else _tensor_core_layer if tensor_cores else _fused_layer
        for index in range(layers):
            layer(floor, pixels, channels + index * growth, 4 * growth, growth)
            if variant.memory == "min":  # the 1x1 once more
                floor.kernel(pixels, channels + index * growth + 4 * growth, 8 * growth * (channels + index * growth))
        floor.kernel(pixels, 2 * (channels if variant.memory else channels + layers * growth))  # input, or last cat
        channels += layers * growth
        last = i + 1 == len(blocks)
        _tail(floor, pixels, channels, 0 if last else channels // 2, variant.memory is not None)
        if not last:
            channels, side = channels // 2, side // 2
    return floor


def _plain_layer(floor: Roofline, pixels: int, c: int, b: int, k: int) -> None:
    first, second = 2 * c * b, 18 * b * k
    floor.kernel(pixels, 2 * c)  # concatenation
    floor.kernel(pixels, 5 * c)  # norm and ReLU
    floor.kernel(pixels, c + b, first)
    floor.kernel(pixels, 5 * b)
    floor.kernel(pixels, b + k, second)
    for _ in range(2):  # with respect to the input, and to the weight
        floor.kernel(pixels, k + b, second)
        floor.kernel(pixels, b + c, first)
    floor.kernel(pixels, 8 * b)
    floor.kernel(pixels, 8 * c)
    floor.kernel(pixels, 3 * c)  # gradients of earlier slices are added up


def _fused_layer(floor: Roofline, pixels: int, c: int, b: int, k: int) -> None:
    first, second = 2 * c * b, 18 * b * k
    floor.kernel(pixels, c)
    floor.kernel(pixels, b, first)
    floor.kernel(pixels, b)  # statistics
    floor.kernel(pixels, 2 * b)
    floor.kernel(pixels, b + k, second)
    floor.kernel(pixels, 2 * k)
    floor.kernel(pixels, 3 * k)  # gradient of the slice
    floor.kernel(pixels, 2 * b)  # the convolution's input again
    for _ in range(2):
        floor.kernel(pixels, k + b, second)
        floor.kernel(pixels, b, first)
    floor.kernel(pixels, 2 * b)
    floor.kernel(pixels, 3 * b)
    floor.kernel(pixels, 3 * c)


def tensor_core_kernels(c: int, b: int, k: int) -> dict[str, tuple[int, int]]:
    """Elements moved and operations per pixel of the kernels of a layer, by a part of their names."""
    first, second = 2 * c * b, 18 * b * k
    return {
        "conv1x1_kernel": (c + b, first),
        "conv_forward_kernel": (b + k, second),
        "SliceGradient": (3 * k, 0),
        "conv_input_gradient_kernel": (k + 2 * b, second),
        "conv_weight_gradient_kernel": (k + b, second),
        "InputGradient": (3 * b, 0),
        "conv1x1_backward_kernel": (b + 3 * c, 2 * first),
    }


def _tensor_core_layer(floor: Roofline, pixels: int, c: int, b: int, k: int) -> None:
    for elements, flops in tensor_core_kernels(c, b, k).values():
        floor.kernel(pixels, elements, flops)


def _stem(floor: Roofline, pixels: float, read: float, channels: int, taps: int) -> None:
    for _ in range(2):  # forward, and the gradient of the weight
        floor.kernel(pixels, read + channels, 6 * taps * channels)


def _pooled_stem(floor: Roofline, batch: int, size: int, channels: int) -> None:
    pixels, pooled = batch * (size // 2) ** 2, batch * (size // 4) ** 2
    _stem(floor, pixels, 12, channels, 49)
    floor.kernel(pixels, 13 * channels)  # norm and ReLU, forward and backward
    floor.kernel(pooled, 2 * (5 * channels + 8 * channels / floor.element_size))  # max pool with 64-bit indices


def _tail(floor: Roofline, pixels: int, c: int, out: int, fused: bool) -> None:
    """A transition, or with ``out`` = 0 the last norm and pooling."""
    flops = 2 * c * out
    if fused:
        floor.kernel(pixels, c + out / 4, flops / 4)
        floor.kernel(pixels, 2 * c + out / 2, flops / 2)
        return
    floor.kernel(pixels, 5 * c)
    floor.kernel(pixels, 8 * c)
    for _ in range(3):
        floor.kernel(pixels, c + out, flops)
    floor.kernel(pixels, 2.5 * out)


def measure_ceilings(dtype: torch.dtype) -> Ceilings:
    """Measures a large copy and a large product on the current GPU; a second or two."""
    copied, side = 1 << 29, 8192
    source = torch.empty(copied, dtype=torch.uint8, device="cuda")
    copy = _median_seconds(torch.empty_like(source).copy_, source)
    factor = torch.randn(side, side, dtype=dtype, device="cuda")
    product = _median_seconds(torch.mm, factor, factor)
    return Ceilings(2 * copied / copy, 2 * side**3 / product)


def raise_clocks(run: Callable[[], object], seconds: float = 0.3) -> None:
    """Runs again and again until a GPU that was idle has its highest clocks, and libraries have made their choices."""
    run()  # which may take long by itself, most of it on the host
    torch.cuda.synchronize()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        run()
        torch.cuda.synchronize()


def _median_seconds(run: Callable[..., object], *arguments: object) -> float:
    """Seconds of the median of some runs, after the clocks have risen."""
    raise_clocks(lambda: run(*arguments))
    samples = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(*arguments)
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return statistics.median(samples)

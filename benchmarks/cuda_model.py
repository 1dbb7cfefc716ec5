# SPDX-License-Identifier: Apache-2.0
"""Predicts the time of a DenseNet's kernels on an H200, in bfloat16 with channels innermost, as one CUDA graph.

A kernel takes a fixed time, and the longest of what its bytes take in device memory and in the L2 cache and of the
cycles that its blocks spend. Rates and cycles are assumptions, none of them measured with this library:

* device memory gives 80 % of 4.3 TB/s to a kernel that streams, less to one that jumps; the L2 cache 5.5 TB/s
* 132 multiprocessors of 1.75 GHz; a third of what the cache of 45 MB holds has to come from memory all the same
* a kernel in a graph costs 2.2 microseconds, for its start, its first loads and its tail
* a block that adds up partial results waits 500 cycles for each turn of its lanes

Expect an error of a third in either direction. The model compares variants, and finds the kernel whose measured time
says that an assumption is wrong.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

MEMORY, L2, CLOCK, PROCESSORS, CACHE = 4.3e12, 5.5e12, 1.75e9, 132, 45e6
FIXED = 2.2e-6
NUMBER = 2  # bytes
SMALL = 1.5e-6  # a kernel that moves next to nothing
TILE = 112  # pixels of a tile of the 3x3, as a rule
STEP, LANES, TURN = 64, 128, 500


class Kernel(NamedTuple):
    name: str
    seconds: float


class Network(NamedTuple):
    layers: tuple[int, ...]
    growth: int
    stem: int


NETWORKS = {"densenet121": Network((6, 12, 24, 16), 32, 64), "densenet201": Network((6, 12, 48, 32), 32, 64)}


def stream(size: float, share: float = 0.8) -> float:
    """Seconds for so many bytes of device memory."""
    return size / MEMORY / share


def cycles(count: float) -> float:
    return count / CLOCK


def from_memory(size: float) -> float:
    return size if size > CACHE else 0.3 * size


def moments(partials: int) -> float:
    """A kernel of its own that joins partial moments."""
    return cycles(math.ceil(partials / LANES) * TURN + 2500)


def last_block(partials: int, columns: int, threads: int = 256) -> float:
    """The same by the block that ends last: four columns a thread, four loads at once."""
    return cycles(math.ceil(partials / (4 * threads / columns) / 4) * 800 + 2500)


def conv1x1(pixels: int, c: int, b: int, train: bool) -> Kernel:
    tile = 128
    while tile > 32 and math.ceil(pixels / tile) < PROCESSORS:
        tile //= 2
    tiles, steps = math.ceil(pixels / tile), math.ceil(c / STEP)
    through_cache = tiles * tile * c * NUMBER + tiles * c * b * NUMBER + pixels * b * NUMBER
    x, z = pixels * c * NUMBER, pixels * b * NUMBER
    memory = stream(from_memory(x) + (z if z > CACHE / 2 else z / 2))
    turns = math.ceil(tiles / (2 * PROCESSORS))
    latency = cycles(turns * (steps * {128: 900, 64: 700, 32: 650}[tile] + 3000))
    time = max(memory, through_cache / L2)
    if tiles > 2 * PROCESSORS:
        shared = cycles(tiles * steps * 1020 / PROCESSORS) / 0.85
        time = max(time, shared) * min(1.6, turns / (tiles / (2 * PROCESSORS)))
    finish = last_block(min(tiles, 2 * PROCESSORS), b) if train else 0
    return Kernel("1x1 forward", max(time, latency) + finish)


class Tile(NamedTuple):
    """Cycles of the 3x3 kernels for a tile of pixels."""

    forward: float = 4600 + 300 + 900  # products, what banks still cost, what lies around
    input_gradient: float = 2300 + 900 + 500
    weight_gradient: float = 1700 + 700


def conv3x3(pixels: int, b: int, k: int, train: bool, tile: Tile) -> Kernel:
    tiles = math.ceil(pixels / TILE)
    work = cycles(math.ceil(tiles / PROCESSORS) * tile.forward + 3500)
    finish = last_block(min(tiles, PROCESSORS), k) if train else 0
    return Kernel("3x3 forward", max(stream(pixels * (b + k) * NUMBER), work) + finish)


def conv3x3_backward(pixels: int, b: int, k: int, tile: Tile) -> Iterator[Kernel]:
    tiles = math.ceil(pixels / TILE)
    each = math.ceil(tiles / PROCESSORS)
    yield Kernel("slice gradient", max(stream(3 * pixels * k * NUMBER, 0.6), SMALL))
    gradient = cycles(each * 2 * tile.input_gradient / 1.25 + 3500)  # two parts share a multiprocessor
    yield Kernel("3x3 gradient of z", max(stream(pixels * (k + 2 * b) * NUMBER), gradient))
    splits = max(1, min(PROCESSORS // 2, math.ceil(tiles / 2)))
    partial = splits * 9 * b * k * 4 / L2
    weight = cycles(each * 2 * tile.weight_gradient + 4000)
    yield Kernel("3x3 gradient of the weight", max(stream(pixels * (k + b) * NUMBER), weight) + partial)
    yield Kernel("3x3 finalise", max(partial + SMALL, moments(splits)))
    z = pixels * b * NUMBER
    yield Kernel("norm2 backward", max(stream((3 if z > CACHE / 2 else 1.5) * z), 2e-6))


def conv1x1_backward(pixels: int, c: int, b: int) -> Iterator[Kernel]:
    across = math.ceil(c / STEP)
    splits = max(1, min(2 * PROCESSORS // across, pixels // 256))
    tiles = math.ceil(pixels / 64)
    turns = math.ceil(across * splits / (2 * PROCESSORS))
    work = cycles(turns * math.ceil(tiles / splits) * 1660 * 2 + 5000) / (2 if across * splits <= PROCESSORS else 1)
    x, z = pixels * c * NUMBER, pixels * b * NUMBER
    memory = (3 * x + z) * (0.5 if 2 * x < CACHE else 1)
    through_cache = tiles * across * (16 + 8 + 8 + 8) * 1024
    yield Kernel("1x1 backward", max(stream(memory, 0.85), through_cache / L2, work))
    yield Kernel("1x1 finalise", max(splits * b * c * 4 * 2 / L2 / 2 + SMALL, moments(splits)))


def layer(pixels: int, c: int, b: int, k: int, train: bool, tile: Tile) -> Iterator[Kernel]:
    yield conv1x1(pixels, c, b, train)
    yield conv3x3(pixels, b, k, train, tile)
    if train:
        yield from conv3x3_backward(pixels, b, k, tile)
        yield from conv1x1_backward(pixels, c, b)


def stem(batch: int, channels: int, train: bool) -> Iterator[Kernel]:
    pixels = batch * 112**2
    values, pooled = pixels * channels, pixels * channels / 4
    images = batch * 3 * 224**2
    products = 2 * 147 * channels * pixels
    yield Kernel("stem conv", max(stream(values * 2 + images * 8, 0.7), products / 200e12))
    if train:
        yield Kernel("stem statistics", stream(values * 2))
        yield Kernel("stem statistics", moments(8 * PROCESSORS))
    yield Kernel("stem pool", stream(values * 2 + pooled * 3, 0.7))
    if train:
        yield Kernel("stem pool sums", stream(values * 2 + pooled * 3, 0.7))
        yield Kernel("stem pool finalise", moments(8 * PROCESSORS))
        yield Kernel("stem pool backward", stream(values * 4 + pooled * 3, 0.7))
        yield Kernel("stem conv backward", max(stream(values * 2 + images * 2, 0.5), products / 150e12))


def transition(pixels: int, c: int, train: bool) -> Iterator[Kernel]:
    size = pixels * c * NUMBER
    chunks = max(1, math.ceil(size / 4 / (CACHE / 3)))
    for _ in range(chunks):
        yield Kernel("transition", stream(size, 0.7) / chunks)
        yield Kernel("transition", stream(size / 4, 0.6) / chunks)
        if train:  # the gradient of y, the windows that make y of it in passing, the weight's gradient
            yield Kernel("transition backward", stream(size / 4, 0.6) / chunks)
            yield Kernel("transition backward", stream(2 * size, 0.7) / chunks)
            yield Kernel("transition backward", stream(size / 4, 0.6) / chunks + 2e-6)
    if train:
        yield Kernel("transition backward", 3e-6)


def network(name: str, batch: int, train: bool, tile: Tile | None = None) -> Iterator[Kernel]:
    """The kernels of a training step without the optimizer, or of a forward pass in eval mode."""
    net, side, c = NETWORKS[name], 56, NETWORKS[name].stem
    b = 4 * net.growth
    yield from stem(batch, c, train)
    for index, layers in enumerate(net.layers):
        pixels = batch * side**2
        yield Kernel("block input", stream(2 * pixels * c * NUMBER))
        if train:
            yield Kernel("block input", moments(min(8 * PROCESSORS, pixels // 32)))
            yield Kernel("block input gradient", stream(3 * pixels * c * NUMBER))
        for number in range(layers):
            yield from layer(pixels, c + number * net.growth, b, net.growth, train, tile or Tile())
        c += layers * net.growth
        if index + 1 < len(net.layers):
            yield from transition(pixels, c, train)
            c, side = c // 2, side // 2
        else:
            yield Kernel("last norm", stream(2 * pixels * c * NUMBER, 0.7))
            if train:
                yield Kernel("last norm backward", stream(3 * pixels * c * NUMBER, 0.7))
    for _ in range(40 if train else 4):
        yield Kernel("head, packing, running statistics, loss", SMALL)


def milliseconds(kernels: Iterator[Kernel]) -> dict[str, float]:
    """By name, slowest first."""
    total: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        total[kernel.name] += 1000 * (kernel.seconds + FIXED)
    return dict(sorted(total.items(), key=lambda item: -item[1]))

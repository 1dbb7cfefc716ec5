# SPDX-License-Identifier: Apache-2.0
"""Counts what a grouped 3x3 convolution with norm, ReLU and moments takes on an H200: ``python -m
benchmarks.grouped_conv_model``.

Cycles of a multiprocessor for 1000 numbers of the result, of a forward pass and of forward and backward, by the fused
kernels and on the library's way. A kernel takes the longest of what its bytes take in device memory and in shared
memory and of its arithmetic. Rates are those of ``benchmarks.cuda_model``, none of them measured:

* device memory gives 80 % of 4.3 TB/s, shared memory 128 bytes a cycle, so that ``ldmatrix`` takes four
* tensor cores make 2048 multiply-adds a cycle in 16 bits; 128 of float32, of which loads leave three quarters
* tiles read 1.4 times their pixels into shared memory, where norm and ReLU read and write them again
* the library's convolutions take what their bytes take in device memory, nothing else; in exact float32 their
  multiply-adds as well

``csrc/cuda/grouped_conv/grouped_conv.h`` takes the fused kernels by default where they win in this count.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.cuda_model import CLOCK, MEMORY, PROCESSORS

BYTES_A_CYCLE = 0.8 * MEMORY / CLOCK / PROCESSORS
SHARED = 128  # bytes a cycle
LOAD, STORE = 4, 0.25  # cycles of ldmatrix, and of a word that a warp stores for 128 numbers
PRODUCT = 16 * 8 * 16 / 2048
MULTIPLY_ADDS = 128 * 0.75
HALO = 1.4
CHUNK = 8  # channels
CHANNELS = (2, 3, 4, 6, 8, 12, 16, 24, 32)  # of a group


class Cycles(NamedTuple):
    memory: float
    shared: float
    arithmetic: float

    def total(self) -> float:
        return max(self)


def window(group: int) -> int:
    """Chunks of eight channels that one such chunk of the result reads, at most."""
    most = 0
    for first in range(0, math.lcm(group, CHUNK), CHUNK):
        begin, end = first // group * group, ((first + CHUNK - 1) // group + 1) * group
        most = max(most, -(-end // CHUNK) - begin // CHUNK)
    return most


def memory(numbers: float, size: int) -> float:
    return 1000 * numbers * size / BYTES_A_CYCLE


def through_shared(size: int, tiles: float, results: float) -> float:
    """Tiles come in, and are read and written by norm and ReLU; results are read on their way out."""
    return 1000 * size * (3 * HALO * tiles + results) / SHARED


def products(group: int) -> Cycles:
    """Of 1000 numbers in 16 bits, the weight's fragments for 512 at once included."""
    steps = math.ceil(9 * window(group) / 2)
    wide = 2 if group % (2 * CHUNK) == 0 else 1  # chunks that share what they read
    loads = steps * (4 / wide * LOAD + wide * LOAD / 2) + 4 * 2 * STORE * 4
    return Cycles(0, loads * 1000 / 512, steps * 4 * PRODUCT * 1000 / 512)


def fused(group: int, size: int) -> Iterator[Cycles]:
    """The forward kernel, then those of backward."""
    if size == 2:
        convolution = products(group)
        pairs = math.ceil(9 * window(group) / 2)
        weight = Cycles(0, (pairs * LOAD + LOAD / 2) * 1000 / 128, pairs * PRODUCT * 1000 / 128)
    else:  # four pixels by four channels: six vectors, and twelve of the weight, which threads share, for 192 numbers
        multiply_adds = 9 * group * 1000 / MULTIPLY_ADDS
        convolution = Cycles(0, 9 * group * 1000 / 192 / 32 * (6 * 4 + 12), multiply_adds)
        weight = Cycles(0, 9 * group * 1000 / 48 / 32 * 4 * 3, multiply_adds)
    for moved, tiles, results, work in ((2, 1, 1, convolution), (3, 1 / 3, 1, convolution), (2, 1.3, 0, weight)):
        yield Cycles(memory(moved, size), work.shared + through_shared(size, tiles, results), work.arithmetic)


def library(group: int, size: int, exact: bool) -> Iterator[Cycles]:
    """Norm and ReLU, convolution, copy, moments; norm and ReLU again, two gradients, sums of the norm."""
    arithmetic = 9 * group * 1000 / MULTIPLY_ADDS if exact else 0
    for moved, work in ((2, 0), (2, 1), (2, 0), (1, 0), (2, 0), (2, 1), (2, 1), (2, 0)):
        yield Cycles(memory(moved, size), 0, work * arithmetic)


def step(kernels: Iterator[Cycles], forward: int) -> tuple[float, float]:
    """Forward, and all."""
    cycles = [kernel.total() for kernel in kernels]
    return sum(cycles[:forward]), sum(cycles)


def is_default(group: int, size: int, exact: bool) -> bool:
    """Whether the fused kernels take less for a training step."""
    return step(fused(group, size), 1)[1] < step(library(group, size, exact), 4)[1]


def main() -> None:
    print(f"{'channels':>8} {'type':>9} {'fused: forward':>15} {'all':>6} {'library: forward':>17} {'all':>6}  default")
    for name, size, exact in (("16 bits", 2, False), ("TF32", 4, False), ("float32", 4, True)):
        for group in CHANNELS:
            ours, theirs = step(fused(group, size), 1), step(library(group, size, exact), 4)
            chosen = "fused" if is_default(group, size, exact) else "library"
            print(f"{group:8} {name:>9} {ours[0]:15.0f} {ours[1]:6.0f} {theirs[0]:17.0f} {theirs[1]:6.0f}  {chosen}")


if __name__ == "__main__":
    main()

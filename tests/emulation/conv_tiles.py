# SPDX-License-Identifier: Apache-2.0
"""Tiles of the 3x3 CUDA kernels, and how often a bank of shared memory is asked at once."""

import ctypes
from typing import NamedTuple

from tests.emulation.build import HERE, load

MOST_PIXELS = 128
ROWS = 8  # that ldmatrix reads at once, in all banks if they lie an odd number of 16 bytes apart


class ConvTile(NamedTuple):
    images: int
    rows: int
    columns: int
    order: list[int]

    @property
    def pixels(self) -> int:
        return self.images * self.rows * self.columns

    def place(self, pixel: int) -> int:
        """Of a pixel among those of the tile with a ring of one pixel around each image."""
        line, column = divmod(pixel, self.columns)
        image, row = divmod(line, self.rows)
        return (image * (self.rows + 2) + row + 1) * (self.columns + 2) + column + 1

    def wavefronts(self) -> float:
        """Accesses one after the other for eight rows, on average; 1 is the least. Missing rows repeat the first."""
        places = [self.place(p) for p in self.order]
        groups = [places[i : i + ROWS] for i in range(0, len(places), ROWS)]
        groups[-1] += places[: ROWS - len(groups[-1])][:1]
        asked = [[place % ROWS for place in set(group)] for group in groups]
        return sum(max(map(banks.count, banks)) for banks in asked) / len(asked)


def conv_tile(batch: int, height: int, width: int) -> ConvTile:
    shape, order = (ctypes.c_int64 * 3)(), (ctypes.c_uint8 * MOST_PIXELS)()
    library = load({HERE / "conv_tiles_entry.cpp": None})
    library.conv_tile(*map(ctypes.c_int64, (batch, height, width)), shape, order)
    images, rows, columns = shape
    return ConvTile(images, rows, columns, list(order)[: images * rows * columns])

// SPDX-License-Identifier: Apache-2.0
// The tiles of the 3x3 kernels, for tests and counts.
#include "dense_block/dense_block_conv_launch.h"

using namespace fastdense;  // NOLINT: a test

extern "C" {
// Shape of a tile: images, rows, columns; and the order of its pixels.
void conv_tile(int64_t batch, int64_t height, int64_t width, int64_t* shape, uint8_t* order) {
  const ConvTiles t = conv_tiles(batch, int(height), int(width), kConvPixels);
  const int64_t values[] = {t.images, t.rows, t.columns};
  std::copy_n(values, 3, shape);
  std::copy_n(t.order, t.pixels(), order);
}
}

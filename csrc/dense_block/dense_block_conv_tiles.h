// SPDX-License-Identifier: Apache-2.0
// What the kernels of dense_block_conv_launch.h share: tiles in shared memory, fragments; included by .cu files only.
#pragma once

#include <type_traits>

#include "cuda/conv_tiles.h"
#include "dense_block/dense_block_conv_launch.h"

namespace fastdense {

template <typename T>
constexpr int kStep = 2 * kChunkNumbers<T>;  // depth of a product

// Distance from a pixel of a tile with its ring to what tap `t` reads of it.
FASTDENSE_HD constexpr int tap_distance(int t, int columns) { return (t / 3 - 1) * (columns + 2) + t % 3 - 1; }

// Tile `n`: where its first pixel lies.
struct TilePlace {
  int64_t image;
  int y, x;
  __device__ TilePlace(const ConvTiles& t, int64_t n) {
    const int64_t across = t.across(), of_image = t.down() * across, group = n / of_image, in = n - group * of_image;
    image = group * t.images;
    y = int(in / across) * t.rows;
    x = int(in % across) * t.columns;
  }
};

// The pixels of tiles and of the ring around them, which are the same for all tiles but for their place.
class TilePixels {
 public:
  static FASTDENSE_HD int64_t bytes(const ConvTiles& t) { return (t.halo() + kConvPixels) * int64_t(sizeof(int)); }
  // Writes the tables: readers need a barrier.
  __device__ TilePixels(const ConvTiles& t, unsigned char* shared)
      : t_(t), where_(reinterpret_cast<int*>(shared)), centre_(where_ + t.halo()) {
    const int wide = t.columns + 2, high = t.rows + 2, halo = t.halo(), pixels = t.pixels();
    for (int p = int(threadIdx.x); p < halo; p += int(blockDim.x)) {
      const int line = p / wide, i = line / high;
      where_[p] = i << 16 | (line - i * high) << 8 | (p - line * wide);
    }
    for (int p = int(threadIdx.x); p < kConvPixels; p += int(blockDim.x))
      centre_[p] = p < pixels ? t.centre(t.order[p]) : -1;
  }
  // Place of the p-th pixel of a tile among those with the ring, -1 beyond the last.
  __device__ int centre(int p) const { return centre_[p]; }
  // Row of z of a pixel of the tile with its ring, -1 outside the image.
  __device__ int64_t halo_row(const TilePlace& place, int p) const {
    const int where = where_[p];
    const int64_t image = place.image + (where >> 16);
    const int y = place.y + (where >> 8 & 0xff) - 1, x = place.x + (where & 0xff) - 1;
    const bool inside = image < t_.batch && 0 <= y && y < t_.height && 0 <= x && x < t_.width;
    return inside ? (image * t_.height + y) * t_.width + x : -1;
  }
  __device__ int64_t row(const TilePlace& place, int p) const {
    return centre_[p] < 0 ? -1 : halo_row(place, centre_[p]);
  }

 private:
  const ConvTiles& t_;
  int *const where_, *const centre_;
};

// Words of fragments as products take them.
template <typename T>
__device__ __forceinline__ uint32_t operand(uint32_t word) {
  if constexpr (sizeof(T) == 4) {
    return tf32_bits(bit_cast<float>(word));
  } else {
    return word;
  }
}
template <typename T>
__device__ __forceinline__ void load_fragments(uint32_t (&m)[4], const unsigned char* row) {
  load_matrices(m, row);
#pragma unroll
  for (int i = 0; i < 4; ++i) m[i] = operand<T>(m[i]);
}

}  // namespace fastdense

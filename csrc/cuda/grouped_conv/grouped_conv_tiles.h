// SPDX-License-Identifier: Apache-2.0
// What the kernels of grouped_conv_launch.h share: places, taps, shared memory; included by .cu files only.
#pragma once

#include "cuda/conv_tiles.h"
#include "cuda/grouped_conv/grouped_conv_launch.h"

namespace fastdense {

constexpr int kGroupedThreads = 256, kGroupedWarps = kGroupedThreads / 32;

// Tile `n`: where its first pixel lies.
struct GroupedPlace {
  int64_t image;
  int y, x;
  __device__ GroupedPlace(const GroupedTiles& t, int64_t n) {
    const int64_t across = t.across(), of_image = t.down() * across;
    image = n / of_image;
    const int64_t in = n - image * of_image;
    y = int(in / across) * t.rows;
    x = int(in % across) * t.columns;
  }
};

// The pixels of tiles and of their source, which are the same for all tiles but for their place.
class GroupedPixels {
 public:
  static FASTDENSE_HD int64_t bytes(const GroupedTiles& t) {
    return (t.places() + kGroupedPixels) * int64_t(sizeof(int));
  }
  // Writes the tables: readers need a barrier.
  __device__ GroupedPixels(const GroupedTiles& t, unsigned char* shared)
      : t_(t), where_(reinterpret_cast<int*>(shared)), pixel_(where_ + t.places()) {
    for (int p = int(threadIdx.x); p < t.places(); p += kGroupedThreads) {
      const int line = p / t.pitch, column = t.column(p - line * t.pitch);
      where_[p] = column < t.length() ? line << 16 | column : -1;
    }
    for (int p = int(threadIdx.x); p < kGroupedPixels; p += kGroupedThreads)
      pixel_[p] = p < t.pixels() ? (p / t.columns) << 16 | p % t.columns : -1;
  }
  // Row of the source of a place, -1 outside the image and where there is no pixel.
  __device__ int64_t source_row(const GroupedPlace& place, int p) const {
    const int where = where_[p];
    const int y = t_.step * place.y + (where >> 16) - 1, x = t_.step * place.x + (where & 0xffff) - 1;
    const bool inside = where >= 0 && 0 <= y && y < t_.source_height && 0 <= x && x < t_.source_width;
    return inside ? (place.image * t_.source_height + y) * t_.source_width + x : -1;
  }
  // Line << 16 | column in a tile of its p-th pixel, -1 beyond the last.
  __device__ int pixel(int p) const { return pixel_[p]; }
  // Row in the grid of the p-th pixel, -1 outside the image and beyond the last.
  __device__ int64_t row(const GroupedPlace& place, int p) const {
    const int pixel = pixel_[p], y = place.y + (pixel >> 16), x = place.x + (pixel & 0xffff);
    return pixel >= 0 && y < t_.height && x < t_.width ? (place.image * t_.height + y) * t_.width + x : -1;
  }

 private:
  const GroupedTiles& t_;
  int *const where_, *const pixel_;
};

// Which taps of the kernel reach a pixel from line or column i = 0, 1, 2 of what it reads.  In backward (`reversed`)
// with a stride of 2 this depends on the pixel's class, the parities of its line and column.
struct GroupedTaps {
  bool reversed;
  int stride;
  FASTDENSE_HD bool by_parity() const { return reversed && stride == 2; }
  FASTDENSE_HD int classes() const { return by_parity() ? 4 : 1; }
  FASTDENSE_HD int parity_y(int c) const { return by_parity() ? c / 2 : 0; }
  FASTDENSE_HD int parity_x(int c) const { return by_parity() ? c % 2 : 0; }
  // Those i that a tap belongs to: so many from `first` on.
  FASTDENSE_HD int first() const { return by_parity() ? 1 : 0; }
  FASTDENSE_HD int count(int parity) const { return by_parity() ? 1 + parity : 3; }
  FASTDENSE_HD int tap(int i, int parity) const { return reversed ? parity + 1 - (i - 1) * stride : i; }
  FASTDENSE_HD int of_class(int c) const { return count(parity_y(c)) * count(parity_x(c)); }
};

// Where the weight [width][9][channels of a group] has what goes from one channel to another, both of one group and
// counted from the first channel of a part.
struct GroupedWeight {
  int group;
  bool reversed;
  FASTDENSE_HD int64_t at(int to, int from, int tap) const {
    const int outer = reversed ? from : to, inner = reversed ? to : from;
    return (int64_t(outer) * kTaps + tap) * group + inner % group;
  }
};

// Scale, shift and mean of a part's channels.
struct GroupedNorm {
  float *scale, *shift, *mean;
  static FASTDENSE_HD int bytes(int channels) { return 3 * channels * int(sizeof(float)); }
  __device__ GroupedNorm(unsigned char* shared, int channels)
      : scale(reinterpret_cast<float*>(shared)), shift(scale + channels), mean(shift + channels) {}
  __device__ void load(const NormParams<float>& norm, int first, int count) const {
    for (int c = int(threadIdx.x); c < count; c += kGroupedThreads) {
      const NormCoefficients<float> n = norm(first + c);
      scale[c] = n.scale;
      shift[c] = n.shift;
      mean[c] = n.mean;
    }
  }
};

}  // namespace fastdense

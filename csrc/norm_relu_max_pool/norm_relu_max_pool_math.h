// SPDX-License-Identifier: Apache-2.0
// Batch norm, ReLU and max pool in one, for a stem.  A pooled value is
//
//   y[o] = max over w of relu(scale * x[o * stride - padding + w] + shift)
//
// over the positions w of the window that lie inside the image, counted with the last axis fastest.  The index of a
// pooled value is the first position of a maximum that is not 0, or the last NaN, as in torch; where the maximum is 0
// no gradient passes the ReLU, and there is no index.  For the gradient g of y, with sums over the pooled values that
// have an index:
//
//   dy[i] = sum of g[o] over the windows o whose index is i     dbias = sum g     dweight = sum g * xhat[index]
//   dx[i] = scale * (dy[i] - (dbias + xhat[i] * dweight) / M), without the correction where statistics are given.
#pragma once

#include <cstdint>

#include "core/batch_norm_math.h"
#include "core/scalar.h"

namespace fastdense {

// Stands for an index where there is none; windows have at most so many positions.
constexpr int kNoIndex = 255;

// Axes are outermost first, missing ones in front with size 1.
struct MaxPoolGeometry {
  int64_t size[3], window[3], stride[3], padding[3];
  int64_t pooled[3];

  FASTDENSE_HD int64_t pixels() const { return size[0] * size[1] * size[2]; }
  FASTDENSE_HD int64_t padded_pixels() const {
    return (size[0] + 2 * padding[0]) * (size[1] + 2 * padding[1]) * (size[2] + 2 * padding[2]);
  }
  FASTDENSE_HD int64_t pooled_pixels() const { return pooled[0] * pooled[1] * pooled[2]; }
  FASTDENSE_HD int64_t volume() const { return window[0] * window[1] * window[2]; }
};

// A half-open range of indices.
struct IndexRange {
  int64_t begin, end;
};

FASTDENSE_HD int64_t max_index(int64_t a, int64_t b) { return a < b ? b : a; }
FASTDENSE_HD int64_t min_index(int64_t a, int64_t b) { return a < b ? a : b; }

// Positions of window `o` along axis d that lie inside the image.
FASTDENSE_HD IndexRange window_positions(const MaxPoolGeometry& g, int d, int64_t o) {
  const int64_t first = o * g.stride[d] - g.padding[d];
  return {max_index(0, -first), min_index(g.window[d], g.size[d] - first)};
}

// Pixel of position 0 of a window, counted over all images; padding may put it outside.
FASTDENSE_HD int64_t window_start(const MaxPoolGeometry& g, int64_t image, int64_t o0, int64_t o1, int64_t o2) {
  const int64_t i0 = o0 * g.stride[0] - g.padding[0], i1 = o1 * g.stride[1] - g.padding[1];
  return ((image * g.size[0] + i0) * g.size[1] + i1) * g.size[2] + o2 * g.stride[2] - g.padding[2];
}

// Pixels from position 0 of a window to position w.
FASTDENSE_HD int64_t position_offset(const MaxPoolGeometry& g, int w) {
  const int size1 = int(g.window[1]), size2 = int(g.window[2]), line = w / size2;
  return ((line / size1) * g.size[1] + line % size1) * g.size[2] + w % size2;
}

// Windows along axis d that contain index i.  Index holds a padded axis.
template <typename Index = int64_t>
FASTDENSE_HD IndexRange windows_of(const MaxPoolGeometry& g, int d, int64_t i) {
  const int64_t last = i + g.padding[d], before = last - g.window[d];
  const auto stride = Index(g.stride[d]);
  return {before < 0 ? 0 : Index(before) / stride + 1, min_index(g.pooled[d], Index(last) / stride + 1)};
}

// Whether a value takes the lead from `best`, which starts at 0; the ReLU is in this comparison.
template <typename A>
FASTDENSE_HD bool takes_lead(A value, A best) {
  return value > best || value != value;
}

}  // namespace fastdense

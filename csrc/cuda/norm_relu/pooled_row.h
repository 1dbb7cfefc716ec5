// SPDX-License-Identifier: Apache-2.0
// From pixels to the windows that average pooling takes them in; included by .cu files only.
#pragma once

#include "core/geometry.h"
#include "cuda/launch.h"

namespace fastdense {

// Which row of pooled pixels belongs to a pixel, pixel by pixel of whole images; -1 outside all windows.  32-bit
// divisions, which GPUs have, within an image.
class PooledRow {
 public:
  __device__ explicit PooledRow(const PoolGeometry& g) : g_(g), pixels_(g.size[0] * g.size[1] * g.size[2]) {}
  __device__ int64_t operator()(int64_t row) {
    while (row >= image_end_) {  // rows come in ascending order
      const int64_t image = row / pixels_;
      image_begin_ = image * pixels_;
      image_end_ = image_begin_ + pixels_;
      pooled_begin_ = image * g_.pixels();
    }
    const auto in = uint32_t(row - image_begin_);
    const auto size1 = uint32_t(g_.size[1]), size2 = uint32_t(g_.size[2]);
    const uint32_t line = in / size2, plane = line / size1;
    const int64_t i0 = window_of(0, plane), i1 = window_of(1, line - plane * size1),
                  i2 = window_of(2, in - line * size2);
    if (i0 < 0 || i1 < 0 || i2 < 0) return -1;
    return pooled_begin_ + (i0 * g_.pooled(1) + i1) * g_.pooled(2) + i2;
  }
  template <typename A>
  __device__ A share() const {
    return A(1) / A(g_.volume());
  }

 private:
  // Windows may be narrower than the strides between them, but do not overlap.
  __device__ int64_t window_of(int d, uint32_t at) const {
    const auto stride = uint32_t(g_.stride[d]);
    const uint32_t i = at / stride;
    return i < g_.pooled(d) && at - i * stride < g_.window[d] ? int64_t(i) : -1;
  }

  const PoolGeometry& g_;
  const int64_t pixels_;
  int64_t image_begin_ = 0, image_end_ = 0, pooled_begin_ = 0;
};

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
// Which input and output pixels the taps of a convolution connect, in up to three dimensions.
#pragma once

#include "cpu/conv1x1/conv1x1.h"

namespace fastdense::FASTDENSE_TARGET {

struct PixelIndex {
  int64_t i[3];
  explicit PixelIndex(const ConvGeometry& g, int64_t pixel)
      : i{pixel / g.plane(), pixel / g.size[2] % g.size[1], pixel % g.size[2]} {}
  void next(const ConvGeometry& g) {
    if (++i[2] < g.size[2]) return;
    i[2] = 0;
    if (++i[1] < g.size[1]) return;
    i[1] = 0;
    ++i[0];
  }
};

// Calls visit(tap, pixel) for every tap at which input pixel p meets an output pixel q = p - offset(tap) whose
// outermost index lies in [begin, end), and outside(tap) for the others.
template <typename Visit, typename Outside>
inline void for_each_tap(const ConvGeometry& g, const PixelIndex& p, int64_t begin, int64_t end, Visit visit,
                         Outside outside) {
  int64_t tap = 0;
  for (int64_t t0 = 0; t0 < g.kernel[0]; ++t0) {
    const int64_t q0 = p.i[0] - t0 + g.kernel[0] / 2;
    for (int64_t t1 = 0; t1 < g.kernel[1]; ++t1) {
      const int64_t q1 = p.i[1] - t1 + g.kernel[1] / 2;
      const bool inside = begin <= q0 && q0 < end && 0 <= q1 && q1 < g.size[1];
      for (int64_t t2 = 0; t2 < g.kernel[2]; ++t2, ++tap) {
        const int64_t q2 = p.i[2] - t2 + g.kernel[2] / 2;
        if (inside && 0 <= q2 && q2 < g.size[2])
          visit(tap, (q0 * g.size[1] + q1) * g.size[2] + q2);
        else
          outside(tap);
      }
    }
  }
}

// The gradient d[pixels, k] of all images, gathered at the taps of the pixels from `row` on: t[rows, taps * k].
template <typename T>
inline void gather_taps(const ConvGeometry& g, int64_t row, int64_t rows, int64_t k, const typename Gemm<T>::Operand* d,
                        const LeftFactor<T>& t) {
  using Operand = typename Gemm<T>::Operand;
  const int64_t pixels = g.pixels();
  int64_t image = row / pixels;
  PixelIndex p(g, row % pixels);
  for (int64_t r = 0; r < rows; ++r) {
    if (p.i[0] == g.size[0]) {
      ++image;
      p = PixelIndex(g, 0);
    }
    Operand* out = t.row(r);
    const Operand* in = d + image * pixels * k;
    for_each_tap(
        g, p, 0, g.size[0],
        [&](int64_t tap, int64_t q) {
          Operand* __restrict o = out + tap * k;
          for (int64_t j = 0; j < k; ++j) o[j] = in[q * k + j];
        },
        [&](int64_t tap) {
          for (int64_t j = 0; j < k; ++j) out[tap * k + j] = Operand{};
        });
    p.next(g);
  }
}

}  // namespace fastdense::FASTDENSE_TARGET

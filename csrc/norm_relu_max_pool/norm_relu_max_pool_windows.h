// SPDX-License-Identifier: Apache-2.0
// The windows of norm_relu_max_pool on the device, V channels a thread: how a pooled pixel reads its window, and how
// the pixels of a cell collect their gradients.  Included by .cu files only.
//
// An image has fewer than 2^32 values, so that 32-bit numbers hold everything within it.  A Windows class has
//   template <int V, typename T, typename Body> static void visit(g, x, pooled, body)
//       body(position, Vector<T, V>, whether the position lies in the image), positions in ascending order
//   kCellPixels;  static uint32_t cells(g);  static void find_pixels(g, cell, pixels)
//       pixels of a cell, kNoPixel outside the image
//   template <int V, typename A, typename T, typename Body> static void gather(g, gradients, cell, body)
//       body(number of a pixel in the cell, its gradient A [V]), windows in ascending order
#pragma once

#include "cuda/norm_relu/column_reduce.h"
#include "norm_relu_max_pool/norm_relu_max_pool_math.h"

namespace fastdense {

constexpr uint32_t kNoPixel = ~uint32_t(0);

// V neighbouring channels of an image; `step` elements from pixel to pixel.
template <typename T, int V>
struct ImageChannels {
  T* data;
  uint32_t step;
  __device__ auto operator[](uint32_t pixel) const { return read<V>(data + uint64_t(pixel) * step, V); }
  __device__ void write(uint32_t pixel, const Vector<T, V>& v) const {
    fastdense::write(data + uint64_t(pixel) * step, v, V);
  }
};

template <typename T, int V>
struct PooledGradients {
  ImageChannels<const T, V> grad;
  ImageChannels<const uint8_t, V> indices;
};

// Adds the gradients of a pooled pixel whose index is `position`.
template <typename T, typename A, int V>
__device__ __forceinline__ void add_where(const Vector<T, V>& grad, const Vector<uint8_t, V>& indices, int position,
                                          A (&dy)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (indices.v[i] == position) dy[i] += load(grad.v[i]);
}

// Every window; a cell is a pixel.
struct AnyWindows {
  static constexpr int kCellPixels = 1;
  static __device__ uint32_t cells(const MaxPoolGeometry& g) { return uint32_t(g.pixels()); }

  // Of pixel or pooled pixel `in`, its indices.
  struct Point {
    uint32_t i0, i1, i2;
    __device__ Point(const int64_t (&size)[3], uint32_t in) {
      const auto size1 = uint32_t(size[1]), size2 = uint32_t(size[2]);
      const uint32_t line = in / size2;
      i0 = line / size1;
      i1 = line - i0 * size1;
      i2 = in - line * size2;
    }
  };

  template <int V, typename T, typename Body>
  static __device__ void visit(const MaxPoolGeometry& g, const ImageChannels<const T, V>& x, uint32_t pooled,
                               const Body& body) {
    const Point o(g.pooled, pooled);
    const IndexRange r0 = window_positions(g, 0, o.i0), r1 = window_positions(g, 1, o.i1),
                     r2 = window_positions(g, 2, o.i2);
    const int64_t start = window_start(g, 0, o.i0, o.i1, o.i2);
    for (int64_t w0 = r0.begin; w0 < r0.end; ++w0)
      for (int64_t w1 = r1.begin; w1 < r1.end; ++w1)
        for (int64_t w2 = r2.begin; w2 < r2.end; ++w2)
          body(int((w0 * g.window[1] + w1) * g.window[2] + w2),
               x[uint32_t(start + (w0 * g.size[1] + w1) * g.size[2] + w2)], true);
  }

  static __device__ void find_pixels(const MaxPoolGeometry&, uint32_t cell, uint32_t (&pixels)[1]) { pixels[0] = cell; }

  template <int V, typename A, typename T, typename Body>
  static __device__ void gather(const MaxPoolGeometry& g, const PooledGradients<T, V>& from, uint32_t cell,
                                const Body& body) {
    A dy[V] = {};
    const Point p(g.size, cell);
    const IndexRange r0 = windows_of<uint32_t>(g, 0, p.i0), r1 = windows_of<uint32_t>(g, 1, p.i1),
                     r2 = windows_of<uint32_t>(g, 2, p.i2);
    for (int64_t o0 = r0.begin; o0 < r0.end; ++o0)
      for (int64_t o1 = r1.begin; o1 < r1.end; ++o1)
        for (int64_t o2 = r2.begin; o2 < r2.end; ++o2) {
          const int64_t w0 = p.i0 + g.padding[0] - o0 * g.stride[0], w1 = p.i1 + g.padding[1] - o1 * g.stride[1],
                        w2 = p.i2 + g.padding[2] - o2 * g.stride[2];
          const auto at = uint32_t((o0 * g.pooled[1] + o1) * g.pooled[2] + o2);
          add_where(from.grad[at], from.indices[at], int((w0 * g.window[1] + w1) * g.window[2] + w2), dy);
        }
    body(0, dy);
  }
};

// Square windows of one kind in two dimensions.  The pixels i with (i + padding) / stride = a along both axes are a
// cell: they are at a * stride - padding + r, and belong to the windows a - j at position r + stride * j.
template <int kWindow, int kStride, int kPadding>
struct SquareWindows {
  static constexpr int kCellPixels = kStride * kStride, kReach = (kWindow + kStride - 1) / kStride;

  static bool are(const MaxPoolGeometry& g) {
    const auto is = [&](int d, int64_t window, int64_t stride, int64_t padding) {
      return g.window[d] == window && g.stride[d] == stride && g.padding[d] == padding;
    };
    return g.size[0] == 1 && is(0, 1, 1, 0) && is(1, kWindow, kStride, kPadding) && is(2, kWindow, kStride, kPadding);
  }

  static __device__ uint32_t across(const MaxPoolGeometry& g, int d) {
    return (uint32_t(g.size[d]) - 1 + kPadding) / kStride + 1;
  }
  static __device__ uint32_t cells(const MaxPoolGeometry& g) { return across(g, 1) * across(g, 2); }

  // Numbers below zero are large ones.
  template <int V, typename T, typename Body>
  static __device__ void visit(const MaxPoolGeometry& g, const ImageChannels<const T, V>& x, uint32_t pooled,
                               const Body& body) {
    const auto size1 = uint32_t(g.size[1]), size2 = uint32_t(g.size[2]), pooled2 = uint32_t(g.pooled[2]);
    const uint32_t o1 = pooled / pooled2, first1 = o1 * kStride - kPadding,
                   first2 = (pooled - o1 * pooled2) * kStride - kPadding;
    Vector<T, V> values[kWindow * kWindow];
    bool inside[kWindow * kWindow];
#pragma unroll
    for (int w = 0; w < kWindow * kWindow; ++w) {
      const uint32_t i1 = first1 + w / kWindow, i2 = first2 + w % kWindow;
      inside[w] = i1 < size1 && i2 < size2;
      values[w] = x[inside[w] ? i1 * size2 + i2 : 0];
    }
#pragma unroll
    for (int w = 0; w < kWindow * kWindow; ++w) body(w, values[w], inside[w]);
  }

  static __device__ void find_pixels(const MaxPoolGeometry& g, uint32_t cell, uint32_t (&pixels)[kCellPixels]) {
    const auto size1 = uint32_t(g.size[1]), size2 = uint32_t(g.size[2]);
    const uint32_t across2 = across(g, 2), a1 = cell / across2, a2 = cell - a1 * across2;
#pragma unroll
    for (int r = 0; r < kCellPixels; ++r) {
      const uint32_t i1 = a1 * kStride - kPadding + r / kStride, i2 = a2 * kStride - kPadding + r % kStride;
      pixels[r] = i1 < size1 && i2 < size2 ? i1 * size2 + i2 : kNoPixel;
    }
  }

  template <int V, typename A, typename T, typename Body>
  static __device__ void gather(const MaxPoolGeometry& g, const PooledGradients<T, V>& from, uint32_t cell,
                                const Body& body) {
    const auto pooled1 = uint32_t(g.pooled[1]), pooled2 = uint32_t(g.pooled[2]);
    const uint32_t across2 = across(g, 2), a1 = cell / across2, a2 = cell - a1 * across2;
    Vector<T, V> grad[kReach * kReach];
    Vector<uint8_t, V> indices[kReach * kReach];
#pragma unroll
    for (int n = 0; n < kReach * kReach; ++n) {
      const uint32_t o1 = a1 - (kReach - 1 - n / kReach), o2 = a2 - (kReach - 1 - n % kReach);
      const bool exists = o1 < pooled1 && o2 < pooled2;
      const uint32_t at = exists ? o1 * pooled2 + o2 : 0;
      grad[n] = from.grad[at];
      indices[n] = from.indices[at];
      if (exists) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) indices[n].v[i] = kNoIndex;
    }
#pragma unroll
    for (int r = 0; r < kCellPixels; ++r) {
      A dy[V] = {};
#pragma unroll
      for (int n = 0; n < kReach * kReach; ++n) {
        const int w1 = r / kStride + kStride * (kReach - 1 - n / kReach),
                  w2 = r % kStride + kStride * (kReach - 1 - n % kReach);
        if (w1 < kWindow && w2 < kWindow) add_where(grad[n], indices[n], w1 * kWindow + w2, dy);
      }
      body(r, dy);
    }
  }
};

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
// CPU loops of norm_relu_max_pool, compiled once for each instruction set.  No torch header.  What one thread does with
// one line: with channels innermost all channels of the pixels along the last axis, else the last axis of one plane.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/simd/dispatch.h"
#include "norm_relu_max_pool/norm_relu_max_pool_math.h"

namespace fastdense {

// What both passes know.  Pixels lie `channels` apart with channels innermost, else images consist of planes.
template <typename T>
struct NormPool {
  using A = accumulate_t<T>;
  MaxPoolGeometry g;
  bool channels_last;
  int64_t channels;
  const A *scale, *shift, *mean, *rstd;  // [channels]
  const T* x;                            // [N, C, size]

  // Images, or all their planes.
  int64_t parts(int64_t images) const { return images * (channels_last ? 1 : channels); }
  int64_t pooled_lines(int64_t images) const { return parts(images) * g.pooled[0] * g.pooled[1]; }

  // Lines that input_gradient() makes at a time: one with channels innermost, else so many of a plane, or of a slice of
  // it along the first of three axes, as stay in the first-level cache.
  int64_t gradient_lines() const {
    constexpr int64_t kMostNumbers = 8192;
    if (channels_last) return 1;
    const int64_t most = max_index(1, kMostNumbers / g.size[2]), blocks = (g.size[1] + most - 1) / most;
    return (g.size[1] + blocks - 1) / blocks;
  }
  int64_t gradient_units(int64_t images) const {
    return parts(images) * g.size[0] * ((g.size[1] + gradient_lines() - 1) / gradient_lines());
  }
};

template <typename T>
struct NormPoolForward : NormPool<T> {
  T* y;              // [N, C, pooled]
  uint8_t* indices;  // [N, C, pooled], or nullptr
};

template <typename T>
struct NormPoolBackward : NormPool<T> {
  using A = accumulate_t<T>;
  const T* grad;           // [N, C, pooled]
  const uint8_t* indices;  // [N, C, pooled]
  const int64_t* offsets;  // [kNoIndex + 1]: elements of x from a window's position 0 to the index; far off if none
  int64_t numbers;         // of x
  T* dx;                   // [N, C, size]
  const A *t1, *t2;        // [channels]: sums of g and of g * xhat
  A inv_count;             // 1 / M; 0 where statistics are given
};

template <typename T>
struct NormPoolKernels {
  using A = accumulate_t<T>;
  // Numbers of workspace that any of these takes.
  int64_t (*workspace)(const NormPool<T>&);
  // A line of y and of indices.
  void (*forward)(const NormPoolForward<T>&, int64_t line, A* workspace);
  // sum += sum of g, weighted += sum of g * (x - mean) over a line of pooled values that have an index.
  void (*sums)(const NormPoolBackward<T>&, int64_t line, double* sum, double* weighted, A* workspace);
  // One of the gradient_units() of dx.
  void (*input_gradient)(const NormPoolBackward<T>&, int64_t unit, A* workspace);
};

FASTDENSE_EACH_ISA(template <typename T> const NormPoolKernels<T>& norm_pool_kernels();)

template <typename T>
inline const NormPoolKernels<T>& norm_pool_kernels(Isa isa) {
  return FASTDENSE_DISPATCH(isa, norm_pool_kernels<T>());
}

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
// The bridge between bicubic_cuda.cpp and bicubic_kernels.cu: parameters and launchers.
#pragma once

#include <cstdint>

#include "bicubic/bicubic_math.h"
#include "cuda/launch.h"

namespace fastdense {

// A banded matrix (bicubic_table.h) in device memory.
template <typename A>
struct BicubicBand {
  int64_t rows, columns, taps;
  const int32_t* start;  // [rows]
  const A* weight;       // [rows, taps]
};

// planes x [columns of the band, inner] to planes x [rows of the band, inner]
template <typename In, typename Out, typename A>
struct BicubicAxisPass {
  const In* input;
  Out* output;
  const Out* residual;  // added to the result, or nullptr
  int64_t planes, inner;
  BicubicBand<A> band;
  bool first;  // of two axes: the result stays in the type of arithmetic (Out = A), rounded to bytes if `round`
  bool round;
  A low, high;
};

// planes x [height, width, inner] to planes x [rows, columns, inner], both axes at once
template <typename T, typename A>
struct BicubicImagePass {
  const T* input;
  T* output;
  const T* residual;
  int64_t planes, height, width, inner;
  BicubicBand<A> rows, columns;
  A low, high;
};

// The most taps of the rows that launch_bicubic_image takes.
constexpr int64_t kMostRollingTaps = 8;

template <typename In, typename Out, typename A>
cudaError_t launch_bicubic_axis(const BicubicAxisPass<In, Out, A>& pass, cudaStream_t stream);

template <typename T, typename A>
cudaError_t launch_bicubic_image(const BicubicImagePass<T, A>& pass, cudaStream_t stream);

}  // namespace fastdense

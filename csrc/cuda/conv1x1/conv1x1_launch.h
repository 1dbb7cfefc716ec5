// SPDX-License-Identifier: Apache-2.0
// A 1x1 convolution behind a batch norm and ReLU as one kernel a direction, on tensor cores of compute capability 8.0
// and up.  No torch header.  Rows are pixels, `columns` the channels of the prefix, `width` those of the result.
//
// T is bfloat16 or half, or float, whose factors are then rounded to TF32; sums are float32.  Rows of x, weight and
// gradient are whole words of 4 bytes, those of z and dz whole 16 bytes.  Forward and backward apply norm and ReLU in
// float32 and round to T, as launch_activate() does.  All sums have a fixed order that depends on the shape and on the
// number of multiprocessors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/norm_relu/norm_relu_launch.h"

namespace fastdense {

// The widths that there are kernels for.
inline bool is_conv1x1_width(int64_t width) {
  return width == 48 || width == 96 || width == 128 || width == 160 || width == 192;
}

// Rows of a tile of launch_conv1x1(): the most that leave a tile for every multiprocessor.
template <typename T>
int64_t conv1x1_tile(int64_t rows, int64_t width, int64_t multiprocessors) {
  int64_t tile = sizeof(T) == 4 && width > 128 ? 64 : 128;  // what shared memory holds
  while (tile > 32 && (rows + tile - 1) / tile < multiprocessors) tile /= 2;
  return tile;
}

// Blocks of launch_conv1x1(): a tile each, or where they take moments as many as fill the device, tiles in turns.
inline int64_t conv1x1_blocks(int64_t rows, int64_t tile, int64_t multiprocessors, bool moments) {
  const int64_t tiles = (rows + tile - 1) / tile;
  return moments ? std::min(tiles, 2 * multiprocessors) : tiles;
}

// z = relu(norm(x)) * weight^T, and if wanted the moments of the z that is stored, with a split a block.  With a norm
// behind it (whose mean is not nullptr) what is stored is relu(behind(z)) of the z that would have been.
template <typename T>
struct Conv1x1Params {
  Matrix<const T> x;       // [rows, columns]
  Matrix<const T> weight;  // [width, columns]
  Matrix<T> z;             // [rows, width]
  NormParams<float> norm;
  BlockMoments moments;
  NormParams<float> behind;
};
template <typename T>
cudaError_t launch_conv1x1(const Conv1x1Params<T>&, int64_t rows, int64_t columns, int64_t width, int64_t tile,
                           int64_t blocks, cudaStream_t);

// Columns and rows of a tile of launch_conv1x1_backward().
template <typename T>
constexpr int64_t conv1x1_backward_columns() {
  return 128 / int64_t(sizeof(T));
}
// Among how many blocks it shares the rows: two blocks a multiprocessor, but several tiles for each.
template <typename T>
int64_t conv1x1_backward_splits(int64_t rows, int64_t columns, int64_t multiprocessors) {
  constexpr int64_t kLeastRows = 256, kAcross = conv1x1_backward_columns<T>();
  const int64_t across = (columns + kAcross - 1) / kAcross;
  return std::max<int64_t>(1, std::min(2 * multiprocessors / across, rows / kLeastRows));
}

// Backward of the same with the gradient dz of z: dy = dz * weight, dym its part in front of the ReLU,
//   gradient (+)= scale * dym,  partial sums of dym and dym * (x - mean),  dweight = dz^T * relu(norm(x)) by splits.
template <typename T>
struct Conv1x1BackwardParams {
  Matrix<const T> dz;      // [rows, width]
  Matrix<const T> x;       // [rows, columns]
  Matrix<const T> weight;  // [width, columns]
  Matrix<T> gradient;      // [rows, columns]
  NormParams<float> norm;
  float* partial;  // [splits][2][columns]
  float* dweight;  // [splits][width][columns], or nullptr: not wanted
  bool add;        // add to `gradient`, else write it
};
template <typename T>
cudaError_t launch_conv1x1_backward(const Conv1x1BackwardParams<T>&, int64_t rows, int64_t columns, int64_t width,
                                    int64_t splits, cudaStream_t);

// to [count] = the sum of partial [splits][count], in a fixed order.
cudaError_t launch_sum_partials(const float* partial, int64_t splits, int64_t count, float* to, cudaStream_t);

// Whether the rows of a matrix of this many columns are whole pieces of so many bytes.
template <typename T>
bool has_rows_of(uintptr_t bytes, const Matrix<T>& m, int64_t columns) {
  return (reinterpret_cast<uintptr_t>(m.data) | uintptr_t(m.ld | columns) * sizeof(T)) % bytes == 0;
}

}  // namespace fastdense

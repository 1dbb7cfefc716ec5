// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of the residual dense block: everything but the convolutions, which are the library's.  No torch header.
// The conventions of cuda/norm_relu/norm_relu_launch.h hold: rows are pixels, channels are innermost, sums are made in
// a fixed order.
#pragma once

#include "cuda/norm_relu/norm_relu_launch.h"
#include "residual_dense_block/residual_dense_block_math.h"

namespace fastdense {

// Rows [first, first + rows) of x as a packed image; zeros where they are not in [begin, end).
template <typename T>
struct PackRowsParams {
  Matrix<const T> x;
  Matrix<T> packed;
  int64_t first, begin, end;
};
template <typename T>
cudaError_t launch_pack_rows(const PackRowsParams<T>&, int64_t rows, int64_t columns, int64_t splits, cudaStream_t);

// A layer's slice of the buffer: y = LeakyReLU(sums + bias).
template <typename T>
struct AppendParams {
  Matrix<const T> sums;
  Matrix<T> y;
  const accumulate_t<T>* bias;  // [columns], or nullptr
  accumulate_t<T> slope;
};
template <typename T>
cudaError_t launch_append(const AppendParams<T>&, int64_t rows, int64_t columns, int64_t splits, cudaStream_t);

// y = inner_scale * (sums + bias) + inner, and unless outer.data is nullptr y = outer_scale * that + outer.
template <typename T>
struct ResidualParams {
  Matrix<const T> sums;
  Matrix<T> y;
  const accumulate_t<T>* bias;  // [columns], or nullptr
  Matrix<const T> inner, outer;
  accumulate_t<T> inner_scale, outer_scale;
};
template <typename T>
cudaError_t launch_residual(const ResidualParams<T>&, int64_t rows, int64_t columns, int64_t splits, cudaStream_t);

// Gradient d of the sums of a convolution from that of its layer's output y, or factor * gradient where y.data is
// nullptr; and its partial sums over rows unless `partial` is nullptr.
template <typename T>
struct SumsGradientParams {
  Matrix<const T> gradient, y;
  Matrix<T> d;
  accumulate_t<T> factor;    // LeakyReLU's slope, or that of all
  accumulate_t<T>* partial;  // [splits][2][columns], the second of each zero
};
template <typename T>
cudaError_t launch_sums_gradient(const SumsGradientParams<T>&, int64_t rows, int64_t columns, int64_t splits,
                                 cudaStream_t);

// gradient += dx in the first `added` rows, and = dx in those behind them, which nobody has written before.
template <typename T>
struct AddRowsParams {
  Matrix<const T> dx;
  Matrix<T> gradient;
  int64_t added;
};
template <typename T>
cudaError_t launch_add_rows(const AddRowsParams<T>&, int64_t rows, int64_t columns, int64_t splits, cudaStream_t);

}  // namespace fastdense

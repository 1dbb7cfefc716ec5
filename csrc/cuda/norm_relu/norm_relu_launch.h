// SPDX-License-Identifier: Apache-2.0
// CUDA kernels that the blocks are built of, but for products and convolutions: norm + ReLU, statistics, slices of a
// buffer, their backward, packed weights.  No torch header.  Rows are pixels, channels are innermost; T is the storage
// type, A = accumulate_t<T> that of arithmetic.
//
// All but the smallest are reductions over a matrix: a thread owns a few neighbouring channels, keeps what belongs to
// them in registers, and walks down rows; lanes of a block beside each other in the rows join their sums in shared
// memory, and blocks write theirs as partial sums [splits][2][columns], which `finalise` kernels add up.  All in a
// fixed order that depends on the shape alone: reruns are bit-identical.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/batch_norm_math.h"
#include "core/dropout_math.h"
#include "core/geometry.h"
#include "cuda/launch.h"

namespace fastdense {

template <typename T>
struct Matrix {
  T* data;
  int64_t ld;  // elements from row to row
  template <typename C>
    requires(!std::is_same_v<C, T> && std::is_same_v<C, const T>)
  FASTDENSE_HD operator Matrix<C>() const {
    return {data, ld};
  }
  FASTDENSE_HD Matrix from_row(int64_t row) const { return {data + row * ld, ld}; }
  FASTDENSE_HD Matrix from_column(int64_t column) const { return {data + column, ld}; }
};

// A batch norm with the statistics that it normalises with.
template <typename A>
struct NormParams {
  const A *weight, *bias;  // or nullptr: 1 and 0
  const A *mean, *var;
  A eps;
  NormParams from_channel(int64_t channel) const {
    return {weight ? weight + channel : nullptr, bias ? bias + channel : nullptr, mean + channel, var + channel, eps};
  }
  FASTDENSE_HD NormCoefficients<A> operator()(int64_t channel) const {
    return norm_coefficients(weight ? weight[channel] : A(1), bias ? bias[channel] : A(0), mean[channel], var[channel],
                             eps);
  }
};

// Among how many blocks a reduction shares its rows, if `blocks` fill the device; more would not be faster, and their
// sums are to be added up.
inline int64_t column_reduce_splits(int64_t rows, int64_t columns, int64_t blocks) {
  constexpr int64_t kBlockColumns = 256, kLeastRows = 32;
  const int64_t across = std::max<int64_t>(1, (columns + kBlockColumns - 1) / kBlockColumns);
  const int64_t most = std::max<int64_t>(1, blocks / across);
  return std::max<int64_t>(1, std::min(most, (rows + kLeastRows - 1) / kLeastRows));
}

// Mask of the features that layer `layer` drops, and their factors; no mask where `seed` is nullptr.
struct DropoutParams {
  const int64_t* seed;  // on the device
  uint32_t layer;
  uint64_t threshold;
  double factor;
};

// y = relu(norm(x)), or without the ReLU.
template <typename T>
struct ActivateParams {
  Matrix<const T> x;
  Matrix<T> y;
  NormParams<accumulate_t<T>> norm;
  bool relu;
};
template <typename T>
cudaError_t launch_activate(const ActivateParams<T>&, int64_t rows, int64_t columns, int64_t splits, cudaStream_t);

// y = mean of relu(norm(x)) over the windows of the pooled pixels [first, first + rows).
template <typename T>
struct ActivatePooledParams {
  Matrix<const T> x;
  Matrix<T> y;
  NormParams<accumulate_t<T>> norm;
  PoolGeometry pool;
  int64_t first;
};
template <typename T>
cudaError_t launch_activate_pooled(const ActivatePooledParams<T>&, int64_t rows, int64_t columns, int64_t splits,
                                   cudaStream_t);

// Partial mean and M2 of the columns of x, relative to its first row: shifted so, the rounding of a mean that is large
// against the deviation does not spoil the latter.
template <typename T>
struct MomentsParams {
  Matrix<const T> x;
  accumulate_t<T>* partial;  // [splits][2][columns]
};
template <typename T>
cudaError_t launch_moments(const MomentsParams<T>&, int64_t rows, int64_t columns, int64_t splits, cudaStream_t);

// New features become a slice of a buffer, or are added to what stands in `add`: x = dropout(features) (+ add), and x's
// moments relative to `pivot` unless `partial` is nullptr.  `add` may be x.
template <typename T>
struct SliceInParams {
  Matrix<const T> features;
  Matrix<T> x;
  DropoutParams dropout;
  accumulate_t<T>* partial;
  Matrix<const T> add;  // data is nullptr where there is nothing to add
  const T* pivot;       // [columns], or nullptr: x's first row, where `add` is not x
};
template <typename T>
cudaError_t launch_slice_in(const SliceInParams<T>&, int64_t rows, int64_t columns, int64_t splits, cudaStream_t);

// mean, var [columns] of x from what launch_moments or launch_slice_in made of it in chunks of rows, each shared among
// `splits` blocks.
template <typename T>
struct FinaliseMomentsParams {
  const accumulate_t<T>* partial;  // [chunks * splits][2][columns]
  const T* pivot;                  // what the moments are relative to, as x's first row; nullptr: zeros
  accumulate_t<T>*mean, *var;
  int64_t chunk;  // rows of a chunk
};
template <typename T>
cudaError_t launch_finalise_moments(const FinaliseMomentsParams<T>&, int64_t rows, int64_t columns, int64_t splits,
                                    cudaStream_t);

// Moments of columns that the blocks of a fused kernel take of their rows.  The block that ends last makes mean and
// variance of them.
struct BlockMoments {
  float* partial = nullptr;               // [splits][2][columns]: mean and M2; nullptr: not wanted
  int64_t* counts = nullptr;              // [splits]: rows of each
  unsigned* ticket = nullptr;             // 0, and so again at the end; nullptr: only the moments of blocks are wanted
  float *mean = nullptr, *var = nullptr;  // [columns]
  int64_t rows = 0;                       // of all
};

// d = dropout factor * gradient of channels whose consumers are done.
template <typename T>
struct SliceGradientParams {
  Matrix<const T> gradient, x;
  Matrix<T> d;
  const accumulate_t<T>* mean;
  const double *shift_sum, *slope_sum;  // [columns]
  DropoutParams dropout;
};
template <typename T>
cudaError_t launch_slice_gradient(const SliceGradientParams<T>&, int64_t rows, int64_t columns, int64_t splits,
                                  cudaStream_t);

// Partial sums of dv and dv * (z - mean) with dv = the gradient du of relu(norm(z)) in front of the ReLU.
template <typename T>
struct MaskReduceParams {
  Matrix<const T> du, z;
  NormParams<accumulate_t<T>> norm;
  accumulate_t<T>* partial;  // [splits][2][columns]
};
template <typename T>
cudaError_t launch_mask_reduce(const MaskReduceParams<T>&, int64_t rows, int64_t columns, int64_t splits, cudaStream_t);

// dz = gradient of the norm's input, over du.
template <typename T>
struct InputGradientParams {
  Matrix<T> du;
  Matrix<const T> z;
  NormParams<accumulate_t<T>> norm;
  const accumulate_t<T>*t1, *t2;  // sums of dv and dv * zhat
  accumulate_t<T> inv_count;      // 0 when frozen
};
template <typename T>
cudaError_t launch_input_gradient(const InputGradientParams<T>&, int64_t rows, int64_t columns, int64_t splits,
                                  cudaStream_t);

// One consumer of a prefix adds its gradient: gradient (+)= scale * dym, with dym the gradient dy of relu(norm(x)), or
// of norm(x), in front of the ReLU, and partial sums of dym and dym * (x - mean).  y = relu(norm(x)) is written over dy
// for the weight's gradient if `keep_y`.  The rows may be a part of all; `splits` of them, the same for every part.
template <typename T>
struct AccumulateParams {
  Matrix<const T> x;
  Matrix<T> dy, gradient;
  NormParams<accumulate_t<T>> norm;
  accumulate_t<T>* partial;  // [splits][2][columns]
  bool relu, keep_y, add;    // add to `gradient`, else write it
};
template <typename T>
cudaError_t launch_accumulate(const AccumulateParams<T>&, int64_t rows, int64_t columns, int64_t splits, cudaStream_t);

// The same behind pooling, for whole images: a row is a window, whose dy goes to its pixels in equal shares; pixels
// outside all windows get none.  y is the mean over the window.
template <typename T>
cudaError_t launch_accumulate_pooled(const AccumulateParams<T>&, const PoolGeometry&, int64_t rows, int64_t columns,
                                     int64_t splits, cudaStream_t);

// Adds up `splits` partial sums of a norm's gradient: dbias = sum dym, dweight = sum dym * xhat, and unless `shift_sum`
// is nullptr the deferred correction shift_sum += scale * dbias / M, slope_sum += scale * rstd * dweight / M.
template <typename A>
struct FinaliseSumsParams {
  const A* partial;
  int64_t splits;
  NormParams<A> norm;
  A *dweight, *dbias;             // [columns]
  double *shift_sum, *slope_sum;  // [columns] or nullptr
  double inv_count;               // 1 / M
};
// Adds up `splits` partial sums [splits][count] of a weight's gradient, in a fixed order: to[o][t][i], whose elements
// are strides apart.
template <typename A>
struct SumPartialsParams {
  const A* partial = nullptr;
  int64_t splits = 0, count = 0;
  A* to = nullptr;
  int64_t taps = 1, inner = 1;
  int64_t outer_stride = 1, tap_stride = 1, inner_stride = 1;
};

// Both in one launch; either may be empty.
template <typename A>
cudaError_t launch_finalise_sums(const FinaliseSumsParams<A>&, int64_t columns, const SumPartialsParams<A>&,
                                 cudaStream_t);

// Convolution weights in the storage type, channels innermost: to[o][t][i] = from[o, i, t].
template <typename From, typename T>
struct PackedWeight {
  const From* from;
  T* to;
  int64_t outer, inner, taps;
  int64_t outer_stride, inner_stride, tap_stride;  // of `from`
  int64_t ld;                                      // elements from one (o, t) of `to` to the next
};
// One launch packs so many.
constexpr int kMostPacked = 48;
template <typename From, typename T>
struct PackWeightsParams {
  PackedWeight<From, T> weights[kMostPacked];
  int count;
};
template <typename From, typename T>
cudaError_t launch_pack_weights(const PackWeightsParams<From, T>&, cudaStream_t);

}  // namespace fastdense

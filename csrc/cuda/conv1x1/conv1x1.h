// SPDX-License-Identifier: Apache-2.0
// The fused kernels of cuda/conv1x1/conv1x1_launch.h on tensors, and when they are used.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>

#include <type_traits>

#include "cuda/block_forward.h"
#include "cuda/conv1x1/conv1x1_launch.h"
#include "cuda/kernel_choice.h"

namespace fastdense {

// Whether a 1x1 with the weight packed [width, columns] that reads relu(norm(x)) runs as one kernel a direction; z
// [rows, width] is its result, or that one's gradient.
//
// The library's way reads x, writes relu(norm(x)) to a workspace in the L2 cache and reads it from there, and takes the
// statistics of z in a pass of its own; backward does the same with dy and y on top.  The fused kernels read x and the
// gradient once and nothing else of that size: per pixel and layer c + 4b + 3k numbers for c + 3b + 3k and two passes
// through the cache forward, 3c + 8b + 5k for 3c + 11b + 5k and four passes backward.  So the fused way is expected to
// win wherever its blocks fill the device.  A block of the forward kernel walks along all of a prefix by itself, where
// a library can share it out: with less than one tile of 32 rows for every fourth multiprocessor most would be idle.
// Even so it spares the start of one kernel, in training of three, and these take about as long as 16 steps along a
// prefix.  All this is counted, nothing of it measured.
template <typename T>
bool fuses_conv1x1(const CudaContext& cuda, const Matrix<const T>& x, const at::Tensor& packed,
                   const Matrix<const T>& z, int64_t rows) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const int64_t width = packed.size(0), columns = packed.size(1);
    const bool possible = rows > 0 && cuda.tensor_cores && (sizeof(T) == 2 || cuda.tf32) && is_conv1x1_width(width) &&
                          has_rows_of(4, x, columns) &&
                          has_rows_of(4, CudaBlockForward<T>::const_matrix(packed), columns) &&
                          has_rows_of(16, z, width);
    constexpr int64_t kLeastRows = 32 / 4, kShort = 16 * 128 / sizeof(T);  // a multiprocessor; columns of 16 steps
    return use_fused(possible, rows >= kLeastRows * cuda.multiprocessors() || columns <= kShort);
  }
}

// z [rows, width] = relu(norm(x)) * packed^T, and mean and variance of its columns where wanted; or with a norm behind
// it relu(behind(z)) in the place of z.
template <typename T>
void conv1x1(const CudaBlockForward<T>& block, const Matrix<const T>& x, const NormParams<accumulate_t<T>>& norm,
             const at::Tensor& packed, const Matrix<T>& z, int64_t rows,
             const BatchStatistics<accumulate_t<T>>& statistics, const NormParams<accumulate_t<T>>& behind = {}) {
  if constexpr (!std::is_same_v<T, double>) {
    const int64_t width = packed.size(0);
    const int64_t processors = block.cuda.multiprocessors(), tile = conv1x1_tile<T>(rows, width, processors);
    const int64_t blocks = conv1x1_blocks(rows, tile, processors, statistics.mean);
    const BlockMoments moments = block.fused_moments(blocks, width, rows, statistics);
    check_launch(launch_conv1x1<T>({x, block.const_matrix(packed), z, norm, moments, behind}, rows, packed.size(1),
                                   width, tile, blocks, block.cuda.stream));
    block.share_moments(statistics, width, rows);
  }
}

// A weight's gradient, where a kernel writes it or partial sums of it, and how these are to be added up.
template <typename A>
struct WeightSum {
  at::Tensor to;
  A* target = nullptr;
  SumPartialsParams<A> params = {};
};

// For the gradient of a weight [k, b, 3, 3], in its layout, from so many partial sums [k][9][b].
template <typename T>
WeightSum<accumulate_t<T>> sum_of_3x3(const CudaBlockForward<T>& block, int64_t splits, const at::Tensor& like) {
  const int64_t k = like.size(0), b = like.size(1), count = k * 9 * b;
  WeightSum<accumulate_t<T>> sum;
  // A single one is the gradient, channels innermost.
  const bool as_like = splits > 1 && like.is_non_overlapping_and_dense() && like.stride(2) == 3 * like.stride(3);
  const int64_t innermost[] = {9 * b, 1, 3 * b, b};
  const at::Tensor& to = sum.to =
      at::empty_strided(like.sizes(), as_like ? like.strides() : innermost, block.options.dtype(block.accumulate()));
  sum.target = block.sums(to);
  if (splits == 1) return sum;
  sum.target = block.reused_weights(splits * count);
  sum.params = {sum.target, splits, count, block.sums(to), 9, b, to.stride(0), to.stride(3), to.stride(1)};
  return sum;
}

// The same of a weight [n, c, 1...] from partial sums [n][c].
template <typename T>
WeightSum<accumulate_t<T>> sum_of_1x1(const CudaBlockForward<T>& block, int64_t splits, const at::Tensor& like) {
  const int64_t c = like.size(1), count = like.size(0) * c;
  const bool as_like = like.stride(0) == c && like.stride(1) == 1 && like.is_non_overlapping_and_dense();
  WeightSum<accumulate_t<T>> sum;
  sum.to = as_like ? at::empty_strided(like.sizes(), like.strides(), block.options.dtype(block.accumulate()))
                   : block.numbers({like.size(0), c});
  sum.target = block.sums(sum.to);
  if (splits == 1) return sum;
  sum.target = block.reused_weights(splits * count);
  sum.params = {sum.target, splits, count, block.sums(sum.to), 1, count};
  return sum;
}

// Partial sums of the norm's gradient [splits, 2, columns], and the gradient of the weight unless it is not wanted.
template <typename A>
struct Conv1x1Backward {
  PartialSums<A> partial;
  WeightSum<A> dweight;
};

// Backward of the same with the gradient dz of z; adds to `gradient`, or writes it.  weight: whose gradient is wanted.
template <typename T>
Conv1x1Backward<accumulate_t<T>> conv1x1_backward(const CudaBlockForward<T>& block, const Matrix<const T>& x,
                                                  const NormParams<accumulate_t<T>>& norm, const at::Tensor& packed,
                                                  const at::Tensor& dz, const Matrix<T>& gradient, bool add,
                                                  const at::Tensor* weight) {
  Conv1x1Backward<accumulate_t<T>> g{};
  if constexpr (!std::is_same_v<T, double>) {
    const int64_t count = dz.size(0), width = packed.size(0), columns = packed.size(1);
    const int64_t splits = conv1x1_backward_splits<T>(count, columns, block.cuda.multiprocessors());
    g.partial = block.reused_partials(splits, columns);
    if (weight != nullptr) g.dweight = sum_of_1x1(block, splits, *weight);
    check_launch(launch_conv1x1_backward<T>(
        {block.const_matrix(dz), x, block.const_matrix(packed), gradient, norm, g.partial.data, g.dweight.target, add},
        count, columns, width, splits, block.cuda.stream));
  }
  return g;
}

}  // namespace fastdense

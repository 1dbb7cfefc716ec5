// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of norm_relu_max_pool that cuda/norm_relu/norm_relu_launch.h lacks.  No torch header.  Sums are partial
// ones [splits][2][channels], for launch_finalise_moments and launch_finalise_sums.
#pragma once

#include <algorithm>

#include "cuda/norm_relu/norm_relu_launch.h"
#include "norm_relu_max_pool/norm_relu_max_pool_math.h"

namespace fastdense {

// How the tensors lie in memory.
struct NormPoolShape {
  MaxPoolGeometry g;
  int64_t channels;
  bool channels_last;
};

// Partial mean and M2 of the channels of contiguous planes x [N, C, pixels], relative to a channel's first value, which
// becomes the pivot.
template <typename T>
struct PlaneMomentsParams {
  const T* x;
  int64_t pixels;
  accumulate_t<T>* partial;  // [splits][2][channels]
  T* pivot;                  // [channels]
};
template <typename T>
cudaError_t launch_plane_moments(const PlaneMomentsParams<T>&, int64_t rows, int64_t channels, int64_t splits,
                                 cudaStream_t);

// Among how many blocks the kernels below share the pixels of each image, and the images: that of a column of channels,
// or of a channel of planes, writes [images * pixels] partial sums.
struct NormPoolSplits {
  int64_t images, pixels;
  int64_t count() const { return images * pixels; }
};
inline NormPoolSplits norm_pool_splits(const NormPoolShape& s, int64_t batch, int64_t blocks) {
  constexpr int64_t kBlockColumns = 256, kLeastPixels = 32;
  const int64_t across = s.channels_last ? (s.channels + kBlockColumns - 1) / kBlockColumns : s.channels;
  const int64_t most = std::max<int64_t>(1, blocks / std::max<int64_t>(1, across));
  const int64_t each = std::max<int64_t>(1, (batch + most - 1) / most), images = (batch + each - 1) / each;
  const int64_t fit = (s.g.pooled_pixels() + kLeastPixels - 1) / kLeastPixels;
  return {images, std::max<int64_t>(1, std::min((most + images - 1) / std::max<int64_t>(1, images), fit))};
}

// y and, unless nullptr, indices.
template <typename T>
struct NormPoolForwardParams {
  NormPoolShape shape;
  NormParams<accumulate_t<T>> norm;
  const T* x;
  T* y;
  uint8_t* indices;
};
template <typename T>
cudaError_t launch_norm_pool(const NormPoolForwardParams<T>&, int64_t batch, const NormPoolSplits&, cudaStream_t);

// Partial sums of g and g * (x - mean) over the pooled values that have an index.
template <typename T>
struct NormPoolSumsParams {
  NormPoolShape shape;
  const T *x, *grad;
  const uint8_t* indices;
  const accumulate_t<T>* mean;
  accumulate_t<T>* partial;  // [splits][2][channels]
};
template <typename T>
cudaError_t launch_norm_pool_sums(const NormPoolSumsParams<T>&, int64_t batch, const NormPoolSplits&, cudaStream_t);

template <typename T>
struct NormPoolBackwardParams {
  NormPoolShape shape;
  NormParams<accumulate_t<T>> norm;
  const T *x, *grad;
  const uint8_t* indices;
  T* dx;
  const accumulate_t<T>*t1, *t2;  // [channels]: sums of g and of g * xhat
  accumulate_t<T> inv_count;      // 1 / M; 0 where statistics are given
};
template <typename T>
cudaError_t launch_norm_pool_backward(const NormPoolBackwardParams<T>&, int64_t batch, const NormPoolSplits&,
                                      cudaStream_t);

}  // namespace fastdense

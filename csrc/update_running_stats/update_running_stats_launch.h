// SPDX-License-Identifier: Apache-2.0
// The CUDA kernel of update_running_stats_: many norms a launch.  No torch header.
#pragma once

#include <cstdint>

#include "core/scalar.h"
#include "cuda/launch.h"

namespace fastdense {

// Running statistics of one norm; strides in elements.
template <typename T>
struct RunningNorm {
  T *mean, *var;
  int64_t mean_stride, var_stride;
  int64_t* batches;
  int64_t channels, offset;
  double momentum;
};

// One launch moves so many norms: the parameters of a kernel have 4 KiB.
constexpr int kMostRunningNorms = 48;
template <typename T, typename A>
struct RunningStatsParams {
  RunningNorm<T> norms[kMostRunningNorms];
  int count;
  const A *mean, *var;        // of the batch
  double batch_count;         // values behind each mean
  const double* total_count;  // instead of batch_count, or nullptr
};
template <typename T, typename A>
cudaError_t launch_running_stats(const RunningStatsParams<T, A>&, cudaStream_t);

}  // namespace fastdense

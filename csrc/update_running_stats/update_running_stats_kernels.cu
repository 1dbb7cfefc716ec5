// SPDX-License-Identifier: Apache-2.0
#include "core/batch_norm_math.h"
#include "update_running_stats/update_running_stats_launch.h"

namespace fastdense {
namespace {

// A block owns a norm.
template <typename T, typename A>
__global__ void running_stats_kernel(const __grid_constant__ RunningStatsParams<T, A> p) {
  wait_for_kernels_before();
  const RunningNorm<T>& n = p.norms[blockIdx.x];
  const int64_t batches = *n.batches + 1;
  __syncthreads();  // all have read before one writes
  if (threadIdx.x == 0) *n.batches = batches;
  const double count = p.total_count ? *p.total_count : p.batch_count, unbias = unbiased_factor(count);
  if (count == 0) return;  // an empty batch has no statistics
  const double factor = running_factor(n.momentum, batches);
  const auto move = [&](T& running, A batch, double scale) {
    const double moved = update_running<double>(double(load(running)), double(batch) * scale, factor);
    running = store<T>(accumulate_t<T>(moved));
  };
  for (int64_t j = threadIdx.x; j < n.channels; j += blockDim.x) {
    move(n.mean[j * n.mean_stride], p.mean[n.offset + j], 1.0);
    move(n.var[j * n.var_stride], p.var[n.offset + j], unbias);
  }
}

}  // namespace

template <typename T, typename A>
cudaError_t launch_running_stats(const RunningStatsParams<T, A>& p, cudaStream_t stream) {
  constexpr unsigned kThreads = 256;
  if (p.count == 0) return cudaSuccess;
  FASTDENSE_LAUNCH((running_stats_kernel<T, A>), dim3(unsigned(p.count)), dim3(kThreads), 0, stream, p);
  return cudaGetLastError();
}

#define FASTDENSE_RUNNING_STATS(T)                                                                        \
  template cudaError_t launch_running_stats<T, float>(const RunningStatsParams<T, float>&, cudaStream_t); \
  template cudaError_t launch_running_stats<T, double>(const RunningStatsParams<T, double>&, cudaStream_t);
FASTDENSE_RUNNING_STATS(float)
FASTDENSE_RUNNING_STATS(double)
FASTDENSE_RUNNING_STATS(bfloat16)
FASTDENSE_RUNNING_STATS(half)
#undef FASTDENSE_RUNNING_STATS

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
#include "cuda/for_each.h"
#include "mean_join/mean_join_launch.h"

namespace fastdense {

template <typename T>
cudaError_t launch_mean_join(const MeanJoin<T>& join, int64_t count, cudaStream_t stream) {
  return for_each(count, join, stream);
}

template cudaError_t launch_mean_join(const MeanJoin<float>&, int64_t, cudaStream_t);
template cudaError_t launch_mean_join(const MeanJoin<double>&, int64_t, cudaStream_t);
template cudaError_t launch_mean_join(const MeanJoin<bfloat16>&, int64_t, cudaStream_t);
template cudaError_t launch_mean_join(const MeanJoin<half>&, int64_t, cudaStream_t);

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
#include "mean_join/mean_join_kernels.h"

namespace fastdense {

template <typename T>
MeanJoinLoop<T> mean_join_loop(const MeanJoin<T>&, [[maybe_unused]] SimdLevel level) {
#if defined(__x86_64__)
  if (level >= SimdLevel::kAvx512) return avx512::mean_join_loop<T>();
  if (level == SimdLevel::kAvx2) return avx2::mean_join_loop<T>();
#endif
  return baseline::mean_join_loop<T>();
}

template MeanJoinLoop<float> mean_join_loop(const MeanJoin<float>&, SimdLevel);
template MeanJoinLoop<double> mean_join_loop(const MeanJoin<double>&, SimdLevel);
template MeanJoinLoop<bfloat16> mean_join_loop(const MeanJoin<bfloat16>&, SimdLevel);
template MeanJoinLoop<half> mean_join_loop(const MeanJoin<half>&, SimdLevel);

}  // namespace fastdense

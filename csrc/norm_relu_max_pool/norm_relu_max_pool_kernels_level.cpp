// SPDX-License-Identifier: Apache-2.0
#include "norm_relu_max_pool/norm_relu_max_pool_kernels.h"

namespace fastdense {

template <typename T>
const NormPoolKernels<T>& norm_pool_kernels([[maybe_unused]] SimdLevel level) {
#if defined(__x86_64__)
  if (level >= SimdLevel::kAvx512) return avx512::norm_pool_kernels<T>();
  if (level == SimdLevel::kAvx2) return avx2::norm_pool_kernels<T>();
#endif
  return baseline::norm_pool_kernels<T>();
}

template const NormPoolKernels<float>& norm_pool_kernels(SimdLevel);
template const NormPoolKernels<double>& norm_pool_kernels(SimdLevel);
template const NormPoolKernels<bfloat16>& norm_pool_kernels(SimdLevel);
template const NormPoolKernels<half>& norm_pool_kernels(SimdLevel);

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
#include "bicubic/bicubic_kernels.h"

namespace fastdense {

template <typename T, typename A>
BicubicKernel<T, A> bicubic_kernel([[maybe_unused]] SimdLevel level) {
#if defined(__x86_64__)
  if (level >= SimdLevel::kAvx512) return avx512::bicubic_kernel<T, A>();
  if (level == SimdLevel::kAvx2) return avx2::bicubic_kernel<T, A>();
#endif
  return baseline::bicubic_kernel<T, A>();
}

template BicubicKernel<float, float> bicubic_kernel<float, float>(SimdLevel);
template BicubicKernel<double, double> bicubic_kernel<double, double>(SimdLevel);
template BicubicKernel<bfloat16, float> bicubic_kernel<bfloat16, float>(SimdLevel);
template BicubicKernel<half, float> bicubic_kernel<half, float>(SimdLevel);
template BicubicKernel<uint8_t, float> bicubic_kernel<uint8_t, float>(SimdLevel);
template BicubicKernel<uint8_t, double> bicubic_kernel<uint8_t, double>(SimdLevel);
template BicubicKernel<uint8_t, int32_t> bicubic_kernel<uint8_t, int32_t>(SimdLevel);

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
#include <type_traits>

#include "common/row_kernels.h"

namespace fastdense {

template <typename T>
const RowKernels<T>& row_kernels([[maybe_unused]] SimdLevel level) {
#ifdef FASTDENSE_HAS_AMX
  if constexpr (std::is_same_v<T, bfloat16>)
    if (level == SimdLevel::kAmx) return amx::row_kernels<T>();
#endif
#ifdef FASTDENSE_HAS_AVX512_BF16
  if constexpr (std::is_same_v<T, bfloat16>)
    if (level >= SimdLevel::kAvx512Bf16) return avx512_bf16::row_kernels<T>();
#endif
#if defined(__x86_64__)
  if (level >= SimdLevel::kAvx512) return avx512::row_kernels<T>();
  if (level == SimdLevel::kAvx2) return avx2::row_kernels<T>();
#endif
  return baseline::row_kernels<T>();
}

template const RowKernels<float>& row_kernels<float>(SimdLevel);
template const RowKernels<double>& row_kernels<double>(SimdLevel);
template const RowKernels<bfloat16>& row_kernels<bfloat16>(SimdLevel);
template const RowKernels<half>& row_kernels<half>(SimdLevel);

}  // namespace fastdense

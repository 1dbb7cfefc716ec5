// SPDX-License-Identifier: Apache-2.0
#include "dense_block/dense_block_kernels.h"

#include <type_traits>

namespace fastdense {

template <typename T>
const DenseBlockKernels<T>& dense_block_kernels([[maybe_unused]] SimdLevel level) {
#ifdef FASTDENSE_HAS_AMX
  if constexpr (std::is_same_v<T, bfloat16>)
    if (level == SimdLevel::kAmx) return amx::dense_block_kernels<T>();
#endif
#ifdef FASTDENSE_HAS_AVX512_BF16
  if constexpr (std::is_same_v<T, bfloat16>)
    if (level >= SimdLevel::kAvx512Bf16) return avx512_bf16::dense_block_kernels<T>();
#endif
#if defined(__x86_64__)
  if (level >= SimdLevel::kAvx512) return avx512::dense_block_kernels<T>();
  if (level == SimdLevel::kAvx2) return avx2::dense_block_kernels<T>();
#endif
  return baseline::dense_block_kernels<T>();
}

template const DenseBlockKernels<float>& dense_block_kernels<float>(SimdLevel);
template const DenseBlockKernels<double>& dense_block_kernels<double>(SimdLevel);
template const DenseBlockKernels<bfloat16>& dense_block_kernels<bfloat16>(SimdLevel);
template const DenseBlockKernels<half>& dense_block_kernels<half>(SimdLevel);

}  // namespace fastdense

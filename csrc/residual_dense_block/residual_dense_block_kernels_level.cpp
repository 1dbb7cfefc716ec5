// SPDX-License-Identifier: Apache-2.0
#include "residual_dense_block/residual_dense_block_kernels.h"

#include <type_traits>

namespace fastdense {

template <typename T>
const ResidualDenseBlockKernels<T>& residual_dense_block_kernels([[maybe_unused]] SimdLevel level) {
#ifdef FASTDENSE_HAS_AMX
  if constexpr (std::is_same_v<T, bfloat16>)
    if (level == SimdLevel::kAmx) return amx::residual_dense_block_kernels<T>();
#endif
#ifdef FASTDENSE_HAS_AVX512_BF16
  if constexpr (std::is_same_v<T, bfloat16>)
    if (level >= SimdLevel::kAvx512Bf16) return avx512_bf16::residual_dense_block_kernels<T>();
#endif
#if defined(__x86_64__)
  if (level >= SimdLevel::kAvx512) return avx512::residual_dense_block_kernels<T>();
  if (level == SimdLevel::kAvx2) return avx2::residual_dense_block_kernels<T>();
#endif
  return baseline::residual_dense_block_kernels<T>();
}

template const ResidualDenseBlockKernels<float>& residual_dense_block_kernels<float>(SimdLevel);
template const ResidualDenseBlockKernels<double>& residual_dense_block_kernels<double>(SimdLevel);
template const ResidualDenseBlockKernels<bfloat16>& residual_dense_block_kernels<bfloat16>(SimdLevel);
template const ResidualDenseBlockKernels<half>& residual_dense_block_kernels<half>(SimdLevel);

}  // namespace fastdense

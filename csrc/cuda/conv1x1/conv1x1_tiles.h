// SPDX-License-Identifier: Apache-2.0
// What the kernels of cuda/conv1x1/conv1x1_launch.h share on the device; included by .cu files only.
#pragma once

#include <type_traits>

#include "cuda/mma.h"
#include "cuda/norm_relu/norm_relu_launch.h"

namespace fastdense {

constexpr int kStepBytes = 128;             // of a row that a tile of the prefix holds
constexpr int kMostSharedBytes = 99 << 10;  // of a block: what compute capability 8.6 and 12.0 offer

// Bytes that a multiprocessor has, of which a block takes 1 KiB on top of what it asks for.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kSharedBytesOfMultiprocessor = 100 << 10;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kSharedBytesOfMultiprocessor = 164 << 10;
#else
constexpr int kSharedBytesOfMultiprocessor = 228 << 10;
#endif

// How many blocks a multiprocessor should have registers for: as many as fit into its shared memory, with 128 registers
// a thread, or 256 where threads need more.
constexpr int least_blocks(int threads, int shared_bytes, bool many_registers) {
  const int by_shared = kSharedBytesOfMultiprocessor / (shared_bytes + 1024);
  const int by_registers = (many_registers ? 256 : 512) / threads;
  return by_shared < 1 || by_registers < 1 ? 1 : by_shared < by_registers ? by_shared : by_registers;
}

struct ChannelScale {
  float scale, shift;
};

// What a norm knows of a channel, read ahead of its use; one that does not exist has a scale and a shift of zero.
struct NormNumbers {
  float weight = 0, bias = 0, mean = 0, var = 1;
  __device__ NormNumbers() {}
  __device__ NormNumbers(const NormParams<float>& norm, int64_t channel)
      : weight(norm.weight ? norm.weight[channel] : 1.0f),
        bias(norm.bias ? norm.bias[channel] : 0.0f),
        mean(norm.mean[channel]),
        var(norm.var[channel]) {}
  __device__ ChannelScale scale(float eps) const {
    const NormCoefficients<float> n = norm_coefficients(weight, bias, mean, var, eps);
    return {n.scale, n.shift};
  }
};

// relu(norm(x)) of the numbers in a word, rounded to storage and ready for a product.
template <typename T>
__device__ __forceinline__ uint32_t activated(uint32_t word, const ChannelScale (&s)[4 / sizeof(T)]) {
  if constexpr (sizeof(T) == 2) {
    return pack_pair<T>(norm_relu(low_of_pair<T>(word), s[0].scale, s[0].shift),
                        norm_relu(high_of_pair<T>(word), s[1].scale, s[1].shift));
  } else {
    return tf32_bits(norm_relu(bit_cast<float>(word), s[0].scale, s[0].shift));
  }
}

// Two neighbouring numbers.
template <typename T>
__device__ __forceinline__ void load_pair(const uint32_t* from, float& low, float& high) {
  if constexpr (sizeof(T) == 2) {
    low = low_of_pair<T>(*from);
    high = high_of_pair<T>(*from);
  } else {
    low = bit_cast<float>(from[0]);
    high = bit_cast<float>(from[1]);
  }
}

// The same, rounded to storage; they become what was stored.
template <typename T>
__device__ __forceinline__ void store_pair(uint32_t* to, float& low, float& high) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t word = *to = pack_pair<T>(low, high);
    low = low_of_pair<T>(word);
    high = high_of_pair<T>(word);
  } else {
    to[0] = bit_cast<uint32_t>(low);
    to[1] = bit_cast<uint32_t>(high);
  }
}

// Sum over the lanes that hold the same column of a fragment of sums.
__device__ __forceinline__ float sum_of_column(float v) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

// body(width) with a constant.
template <typename Body>
auto with_width(int64_t width, const Body& body) {
  switch (width) {
    case 48:
      return body(std::integral_constant<int, 48>());
    case 96:
      return body(std::integral_constant<int, 96>());
    case 128:
      return body(std::integral_constant<int, 128>());
    case 160:
      return body(std::integral_constant<int, 160>());
    default:
      return body(std::integral_constant<int, 192>());
  }
}

}  // namespace fastdense

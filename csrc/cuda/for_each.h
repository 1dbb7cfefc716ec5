// SPDX-License-Identifier: Apache-2.0
// for_each(count, functor, stream) calls functor(i) on the device for every i in [0, count): the whole kernel
// of an elementwise op.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"

namespace fastdense {

template <typename Functor>
__global__ void for_each_kernel(int64_t count, Functor functor) {
  wait_for_kernels_before();
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) functor(i);
}

template <typename Functor>
cudaError_t for_each(int64_t count, const Functor& functor, cudaStream_t stream) {
  constexpr int64_t kThreads = 256;
  // Enough blocks to fill any GPU many times over; beyond that the threads stride.
  constexpr int64_t kMaxBlocks = 1 << 16;
  if (count <= 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(std::min((count - 1) / kThreads + 1, kMaxBlocks));
  FASTDENSE_LAUNCH(for_each_kernel<Functor>, dim3(blocks), dim3(kThreads), 0, stream, count, functor);
  return cudaGetLastError();
}

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
// The current stream and what kernels need to know of the current device, as a CudaContext.
#pragma once

#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>

#include "cuda/block_forward.h"
#include "cuda/mma_available.h"

namespace fastdense {

// Whether the kernels of this build use the tensor cores of a device; asked once.
inline bool has_tensor_cores(int device) {
  static std::mutex mutex;
  static std::map<int, bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] = known.try_emplace(device, false);
  if (is_new) C10_CUDA_CHECK(mma_available(&found->second));
  return found->second;
}

// A third of the L2 cache; a small cache is not worth the many launches of small chunks.
inline CudaContext current_context() {
  constexpr int64_t kLeastWorkspace = int64_t(16) << 20;
  int device = 0, l2 = 0, multiprocessors = 0, major = 0, shared = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const auto tf32 = [](at::Float32Op op) {
    return at::globalContext().float32Precision(at::Float32Backend::CUDA, op) == at::Float32Precision::TF32;
  };
  return {c10::cuda::getCurrentCUDAStream(),
          std::max(kLeastWorkspace, int64_t(l2) / 3),
          CudaContext::kBlocks * int64_t(multiprocessors),
          major >= 8 && has_tensor_cores(device),
          tf32(at::Float32Op::MATMUL),
          tf32(at::Float32Op::CONV),
          shared};
}

}  // namespace fastdense

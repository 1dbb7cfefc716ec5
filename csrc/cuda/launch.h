// SPDX-License-Identifier: Apache-2.0
// CUDA's types and launch syntax, or under FASTDENSE_EMULATE their host twins, so that a .cu file reads the
// same for nvcc and for a host compiler. FASTDENSE_LAUNCH(kernel, grid, block, shared_bytes, stream,
// arguments...) starts a kernel; a kernel with more than one template argument is put in parentheses.
// FASTDENSE_SHARED(name) names a kernel's dynamic shared memory, of which more than 48 KiB must be allowed first, by
// FASTDENSE_ALLOW_SHARED; FASTDENSE_CHECK_ALIGNED is for the emulation.
#pragma once

#ifdef FASTDENSE_EMULATE
#include "emulation.h"
#else
#include <cuda_runtime_api.h>

#include <mutex>
#include <set>
#include <utility>

namespace fastdense {

// Once a kernel and device: the call costs about a microsecond.  Such kernels want all the shared memory there is.
inline cudaError_t allow_shared(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) > 0) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) allowed.insert({kernel, device});
  return error;
}

}  // namespace fastdense

#define FASTDENSE_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define FASTDENSE_CHECK_ALIGNED(address, bytes) \
  do {                                          \
  } while (false)
#define FASTDENSE_ALLOW_SHARED(kernel, bytes) ::fastdense::allow_shared(reinterpret_cast<const void*>(kernel), bytes)
#define FASTDENSE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#endif

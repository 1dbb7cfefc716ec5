// SPDX-License-Identifier: Apache-2.0
// CUDA's types and launch syntax, or under FASTDENSE_EMULATE their host twins, so that a .cu file reads the
// same for nvcc and for a host compiler. FASTDENSE_LAUNCH(kernel, grid, block, shared_bytes, stream,
// arguments...) starts a kernel, named with its template arguments; one with more than one is put in parentheses.
// FASTDENSE_SHARED(name) names a kernel's dynamic shared memory, of which more than 48 KiB must be allowed first, by
// FASTDENSE_ALLOW_SHARED; FASTDENSE_CHECK_ALIGNED is for the emulation.
//
// Every kernel begins with wait_for_kernels_before(): from there on it sees what kernels before it in the stream wrote,
// and may write.  See cuda/dependent_launch.h.
#pragma once

#ifdef FASTDENSE_EMULATE
#include "emulation.h"
#else
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

#include "cuda/dependent_launch.h"

namespace fastdense {

// Once a kernel and device: the call costs about a microsecond.  Such kernels want all the shared memory there is.
inline cudaError_t allow_shared(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int> > allowed;
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

// Whether a kernel may be started before the one before it has ended: what the driver runs on the current device must
// be code that waits.  Asked once a kernel and device; an error is left to the launch.
inline bool may_start_early(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> known;
  int device = 0;
  if (!dependent_launch() || cudaGetDevice(&device) != cudaSuccess) return false;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] = known.try_emplace({kernel, device}, false);
  cudaFuncAttributes attributes{};
  if (is_new && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) found->second = attributes.ptxVersion >= 90;
  return found->second;
}

#ifdef __CUDACC__
__device__ __forceinline__ void wait_for_kernels_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900  // what has ptxVersion 90 and up
  asm volatile("griddepcontrol.wait;" ::: "memory");
  // Only now may the next one come, which then waits for this one: no kernel overtakes two.
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
#endif

// cudaGetLastError() has its error.
template <typename... Parameters>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   std::type_identity_t<Parameters>... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  void* pointers[] = {&arguments...};
  if (!may_start_early(function)) {
    cudaLaunchKernel(function, grid, block, pointers, shared_bytes, stream);
    return;
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  cudaLaunchKernelExC(&config, function, pointers);
}

}  // namespace fastdense

#define FASTDENSE_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define FASTDENSE_CHECK_ALIGNED(address, bytes) \
  do {                                          \
  } while (false)
#define FASTDENSE_ALLOW_SHARED(kernel, bytes) ::fastdense::allow_shared(reinterpret_cast<const void*>(kernel), bytes)
#define FASTDENSE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::fastdense::launch_kernel(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#endif

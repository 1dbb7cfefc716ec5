// SPDX-License-Identifier: Apache-2.0
// CUDA's types and launch syntax, or under FASTDENSE_EMULATE their host twins, so that a .cu file reads the
// same for nvcc and for a host compiler. FASTDENSE_LAUNCH(kernel, grid, block, shared_bytes, stream,
// arguments...) starts a kernel; a kernel with more than one template argument is put in parentheses.
// FASTDENSE_SHARED(name) names a kernel's dynamic shared memory, of which more than 48 KiB must be allowed first;
// FASTDENSE_CHECK_ALIGNED is for the emulation.
#pragma once

#ifdef FASTDENSE_EMULATE
#include "emulation.h"
#else
#include <cuda_runtime_api.h>
#define FASTDENSE_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define FASTDENSE_CHECK_ALIGNED(address, bytes) \
  do {                                          \
  } while (false)
#define FASTDENSE_ALLOW_SHARED(kernel, bytes) \
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes))
#define FASTDENSE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#endif

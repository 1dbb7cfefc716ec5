// SPDX-License-Identifier: Apache-2.0
#include "cuda/mma_available.h"

namespace fastdense {
namespace {

// Compiled like the kernels that it stands for.
__global__ void probe_kernel() {}

}  // namespace

cudaError_t mma_available(bool* has) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  *has = attributes.ptxVersion >= 80;
  return error;
}

}  // namespace fastdense

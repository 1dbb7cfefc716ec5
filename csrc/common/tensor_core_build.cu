// SPDX-License-Identifier: Apache-2.0
#include "common/tensor_core_build.h"

namespace fastdense {
namespace {

// Compiled like the kernels that it stands for.
__global__ void probe_kernel() {}

}  // namespace

cudaError_t has_tensor_core_build(bool* has) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  *has = attributes.ptxVersion >= 80;
  return error;
}

}  // namespace fastdense

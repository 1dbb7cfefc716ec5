// SPDX-License-Identifier: Apache-2.0
// Which CUDA code runs where there are two ways: one fused kernel of this library on tensor cores, or the kernels of
// cuda/norm_relu/norm_relu_launch.h around PyTorch's products and convolutions ("library").
// FASTDENSE_CUDA_KERNELS=auto|fused|library in the environment decides for all shapes; "auto", the default, shape by
// shape.
//
// Each operation that has a fused kernel gives two answers here: whether the kernel can take a shape, and whether it
// is expected to be the faster way.  Forward and backward ask with the same numbers, so that what backward recomputes
// is bit-identical to forward.  No kernel has ever been timed on a GPU: the expectations count bytes, and say so.
#pragma once

namespace fastdense {

enum class CudaKernels { kAuto = 0, kFused = 1, kLibrary = 2 };

CudaKernels cuda_kernels();

const char* cuda_kernels_name(CudaKernels kernels);

// For tests; throws std::invalid_argument when there is no such choice.
void set_cuda_kernels(const char* name);

// possible: the device and the fused kernel can do it.  faster: it is expected to pay.
inline bool use_fused(bool possible, bool faster) {
  switch (cuda_kernels()) {
    case CudaKernels::kFused:
      return possible;
    case CudaKernels::kLibrary:
      return false;
    default:
      return possible && faster;
  }
}

}  // namespace fastdense

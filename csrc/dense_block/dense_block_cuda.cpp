// SPDX-License-Identifier: Apache-2.0
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "dense_block/dense_block_cuda.h"

namespace fastdense {
namespace {

// A third of the L2 cache; a small cache is not worth the many launches of small chunks.
int64_t scratch_bytes() {
  constexpr int64_t kLeast = int64_t(16) << 20;
  int device = 0, l2 = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device));
  return std::max(kLeast, int64_t(l2) / 3);
}

struct CudaEngine {
  using Guard = c10::cuda::CUDAGuard;
  static CudaContext context() { return {c10::cuda::getCurrentCUDAStream(), scratch_bytes()}; }

  template <typename T>
  static void forward(const DenseBlockArgs& args, const at::Tensor& input, const std::optional<at::Tensor>& seed,
                      const DenseBlockOutputs& o) {
    dense_block_forward_cuda<T>(args, input, seed, o, context());
  }
  template <typename T>
  static std::vector<at::Tensor> backward(const DenseBlockArgs& args, const DenseBlockSaved& saved,
                                          const at::Tensor& grad_output, const std::optional<at::Tensor>& seed,
                                          const std::vector<bool>& needs, at::TensorList weights) {
    return dense_block_backward_cuda<T>(args, saved, grad_output, seed, needs, weights, context());
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CUDA, m) {
  m.impl("dense_block", &dense_block<CudaEngine>);
  m.impl("_dense_block_backward", &dense_block_backward<CudaEngine>);
}

}  // namespace fastdense

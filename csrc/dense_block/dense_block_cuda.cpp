// SPDX-License-Identifier: Apache-2.0
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "dense_block/dense_block_cuda.h"

namespace fastdense {
namespace {

// A third of the L2 cache; a small cache is not worth the many launches of small chunks.  Eight blocks an SM fill it.
CudaContext current_context() {
  constexpr int64_t kLeastScratch = int64_t(16) << 20;
  int device = 0, l2 = 0, multiprocessors = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return {c10::cuda::getCurrentCUDAStream(), std::max(kLeastScratch, int64_t(l2) / 3), 8 * int64_t(multiprocessors)};
}

struct CudaEngine {
  using Guard = c10::cuda::CUDAGuard;
  template <typename T>
  static void forward(const DenseBlockArgs& args, const at::Tensor& input, const std::optional<at::Tensor>& seed,
                      const DenseBlockOutputs& o) {
    dense_block_forward_cuda<T>(args, input, seed, o, current_context());
  }
  template <typename T>
  static std::vector<at::Tensor> backward(const DenseBlockArgs& args, const DenseBlockSaved& saved,
                                          const at::Tensor& grad_output, const std::optional<at::Tensor>& seed,
                                          const std::vector<bool>& needs, at::TensorList weights) {
    return dense_block_backward_cuda<T>(args, saved, grad_output, seed, needs, weights, current_context());
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CUDA, m) {
  m.impl("dense_block", &dense_block<CudaEngine>);
  m.impl("_dense_block_backward", &dense_block_backward<CudaEngine>);
}

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "cuda/context.h"
#include "dense_block/dense_block_cuda.h"

namespace fastdense {
namespace {

struct CudaEngine {
  using Guard = c10::DeviceGuard;
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

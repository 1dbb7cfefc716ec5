// SPDX-License-Identifier: Apache-2.0
#include "residual_dense_block/residual_dense_block_cuda.h"

#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "cuda/context.h"

namespace fastdense {
namespace {

struct CudaEngine {
  using Guard = c10::DeviceGuard;
  template <typename T>
  static void forward(const ResidualDenseBlockArgs& args, const at::Tensor& outer, const ResidualDenseBlockOutputs& o) {
    ResidualDenseBlockCuda<T>(args, o.buffer, current_context()).forward(outer, o.out);
  }
  template <typename T>
  static std::vector<at::Tensor> backward(const ResidualDenseBlockArgs& args, const at::Tensor& buffer,
                                          const at::Tensor& grad_output, const std::vector<bool>& needs,
                                          at::TensorList weights) {
    return ResidualDenseBlockCuda<T>(args, buffer, current_context()).backward(grad_output, needs, weights);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CUDA, m) {
  m.impl("residual_dense_block", &residual_dense_block<CudaEngine>);
  m.impl("_residual_dense_block_backward", &residual_dense_block_backward<CudaEngine>);
}

}  // namespace fastdense

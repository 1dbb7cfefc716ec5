// SPDX-License-Identifier: Apache-2.0
#include "norm_relu_max_pool/norm_relu_max_pool_cuda.h"

#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "cuda/context.h"

namespace fastdense {
namespace {

struct CudaEngine {
  using Guard = c10::DeviceGuard;
  template <typename T>
  static void forward(const NormPoolArgs& args, const at::Tensor& input, const NormPoolOutputs& o) {
    NormPoolCuda<T>(args, input.options(), current_context()).forward(input, o);
  }
  template <typename T>
  static std::vector<at::Tensor> backward(const NormPoolArgs& args, const NormPoolSaved& saved,
                                          const at::Tensor& grad_output, const std::vector<bool>& needs,
                                          at::TensorList norm) {
    return NormPoolCuda<T>(args, saved.input.options(), current_context()).backward(saved, grad_output, needs, norm);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CUDA, m) {
  m.impl("norm_relu_max_pool", &norm_relu_max_pool<CudaEngine>);
  m.impl("_norm_relu_max_pool_backward", &norm_relu_max_pool_backward<CudaEngine>);
}

}  // namespace fastdense

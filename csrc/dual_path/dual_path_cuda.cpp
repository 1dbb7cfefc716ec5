// SPDX-License-Identifier: Apache-2.0
#include "dual_path/dual_path_cuda.h"

#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "cuda/context.h"

namespace fastdense {
namespace {

struct CudaEngine {
  using Guard = c10::DeviceGuard;
  template <typename T>
  static void forward(const DualPathArgs& args, DualPathKeep keep, const at::Tensor& input, const DualPathOutputs& o) {
    dual_path_forward_cuda<T>(args, keep, input, o, current_context());
  }
  template <typename T>
  static std::vector<at::Tensor> backward(const DualPathArgs& args, const DualPathSaved& saved,
                                          const at::Tensor& grad_output, const std::vector<bool>& needs,
                                          at::TensorList weights) {
    return dual_path_backward_cuda<T>(args, saved, grad_output, needs, weights, current_context());
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CUDA, m) {
  m.impl("dual_path_stage", &dual_path_stage<CudaEngine>);
  m.impl("_dual_path_stage_backward", &dual_path_stage_backward<CudaEngine>);
}

}  // namespace fastdense

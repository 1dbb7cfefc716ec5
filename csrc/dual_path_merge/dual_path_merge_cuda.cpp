// SPDX-License-Identifier: Apache-2.0
#include <ATen/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "dual_path_merge/dual_path_merge.h"
#include "dual_path_merge/dual_path_merge_launch.h"

namespace fastdense {
namespace {

const auto run_on_cuda = [](const auto& functor, int64_t count) {
  C10_CUDA_CHECK(launch_path_elements(functor, count, c10::cuda::getCurrentCUDAStream()));
};

at::Tensor merge(const at::Tensor& input, const at::Tensor& features, int64_t residual_channels) {
  const c10::OptionalDeviceGuard guard(at::device_of(input));
  return dual_path_merge(input, features, residual_channels, run_on_cuda);
}

std::tuple<at::Tensor, at::Tensor> split(const at::Tensor& input, int64_t channels, int64_t residual_channels) {
  const c10::OptionalDeviceGuard guard(at::device_of(input));
  return dual_path_split(input, channels, residual_channels, run_on_cuda);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CUDA, m) {
  m.impl("dual_path_merge", &merge);
  m.impl("dual_path_split", &split);
}

}  // namespace fastdense

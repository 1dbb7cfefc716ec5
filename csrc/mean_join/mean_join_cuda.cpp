// SPDX-License-Identifier: Apache-2.0
#include <ATen/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "mean_join/mean_join.h"
#include "mean_join/mean_join_launch.h"

namespace fastdense {
namespace {

at::Tensor mean_join_cuda(at::TensorList inputs) {
  const c10::OptionalDeviceGuard guard(at::device_of(inputs[0]));
  return mean_join(inputs, [](const auto& functor, int64_t count) {
    C10_CUDA_CHECK(launch_mean_join(functor, count, c10::cuda::getCurrentCUDAStream()));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CUDA, m) { m.impl("mean_join", &mean_join_cuda); }

}  // namespace fastdense

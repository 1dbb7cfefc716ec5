// SPDX-License-Identifier: Apache-2.0
#include "update_running_stats/update_running_stats_cuda.h"

#include <ATen/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

namespace fastdense {
namespace {

void update_running_stats_cuda(at::TensorList running_mean, at::TensorList running_var, at::TensorList batches,
                               const at::Tensor& mean, const at::Tensor& var, at::IntArrayRef offsets,
                               at::ArrayRef<double> momentum, int64_t count,
                               const std::optional<at::Tensor>& total_count) {
  const c10::OptionalDeviceGuard guard(at::device_of(mean));
  update_running_stats_on({running_mean, running_var, batches, mean, var, offsets, momentum, count, total_count},
                          c10::cuda::getCurrentCUDAStream());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CUDA, m) { m.impl("update_running_stats_", &update_running_stats_cuda); }

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
#include <ATen/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "dropout_mask/dropout_mask.h"
#include "dropout_mask/dropout_mask_launch.h"

namespace fastdense {
namespace {

at::Tensor dropout_mask_cuda(const at::Tensor& seed, int64_t layer, int64_t rows, int64_t channels, double drop_rate) {
  const c10::OptionalDeviceGuard guard(at::device_of(seed));
  const at::Tensor mask = dropout_mask_prepare(seed, layer, rows, channels, drop_rate);
  if (!has_values(mask)) return mask;
  const DropoutMask fill = dropout_mask_params(seed, mask, layer, drop_rate);
  C10_CUDA_CHECK(launch_dropout_mask(fill, c10::cuda::getCurrentCUDAStream()));
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CUDA, m) { m.impl("dropout_mask", &dropout_mask_cuda); }

}  // namespace fastdense

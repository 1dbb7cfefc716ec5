// SPDX-License-Identifier: Apache-2.0
#include <ATen/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "highway_gate/highway_gate.h"
#include "highway_gate/highway_gate_launch.h"

namespace fastdense {
namespace {

at::Tensor highway_gate_cuda(const at::Tensor& input, const at::Tensor& projection, std::string_view activation) {
  const c10::OptionalDeviceGuard guard(at::device_of(input));
  const HighwayForwardCall call("highway_gate", input, projection, activation);
  if (!has_values(call.output)) return call.output;
  dispatch_highway_gate(input.scalar_type(), activation, [&](auto type, auto act) {
    const auto gate = call.functor(type, act);
    C10_CUDA_CHECK(launch_highway_gate(gate, call.output.numel(), c10::cuda::getCurrentCUDAStream()));
  });
  return call.output;
}

std::tuple<at::Tensor, at::Tensor> highway_gate_backward_cuda(const at::Tensor& grad_output, const at::Tensor& input,
                                                              const at::Tensor& projection,
                                                              std::string_view activation) {
  const c10::OptionalDeviceGuard guard(at::device_of(input));
  const HighwayBackwardCall call("_highway_gate_backward", grad_output, input, projection, activation);
  if (!has_values(call.grad_input)) return {call.grad_input, call.grad_projection};
  dispatch_highway_gate(input.scalar_type(), activation, [&](auto type, auto act) {
    const auto gate = call.functor(type, act);
    C10_CUDA_CHECK(launch_highway_gate_backward(gate, call.grad_input.numel(), c10::cuda::getCurrentCUDAStream()));
  });
  return {call.grad_input, call.grad_projection};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CUDA, m) {
  m.impl("highway_gate", &highway_gate_cuda);
  m.impl("_highway_gate_backward", &highway_gate_backward_cuda);
}

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "highway_gate/highway_gate.h"
#include "highway_gate/highway_gate_kernels.h"

namespace fastdense {
namespace {

constexpr int64_t kGrain = 8192;

at::Tensor highway_gate_cpu(const at::Tensor& input, const at::Tensor& projection, std::string_view activation) {
  const HighwayForwardCall call("highway_gate", input, projection, activation);
  if (!has_values(call.output)) return call.output;
  dispatch_highway_gate(input.scalar_type(), activation, [&](auto type, auto act) {
    const auto gate = call.functor(type, act);
    const auto loop = highway_loops<decltype(type), decltype(act)>(current_isa()).forward;
    at::parallel_for(0, call.output.numel(), kGrain, [&](int64_t begin, int64_t end) { loop(gate, begin, end); });
  });
  return call.output;
}

std::tuple<at::Tensor, at::Tensor> highway_gate_backward_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                                                             const at::Tensor& projection,
                                                             std::string_view activation) {
  const HighwayBackwardCall call("_highway_gate_backward", grad_output, input, projection, activation);
  if (!has_values(call.grad_input)) return {call.grad_input, call.grad_projection};
  dispatch_highway_gate(input.scalar_type(), activation, [&](auto type, auto act) {
    const auto gate = call.functor(type, act);
    const auto loop = highway_loops<decltype(type), decltype(act)>(current_isa()).backward;
    at::parallel_for(0, call.grad_input.numel(), kGrain, [&](int64_t begin, int64_t end) { loop(gate, begin, end); });
  });
  return {call.grad_input, call.grad_projection};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) {
  m.impl("highway_gate", &highway_gate_cpu);
  m.impl("_highway_gate_backward", &highway_gate_backward_cpu);
}
TORCH_LIBRARY_IMPL(fastdense_meta, Meta, m) {
  m.impl("highway_gate", &highway_gate_cpu);
  m.impl("_highway_gate_backward", &highway_gate_backward_cpu);
}

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "highway_gate/highway_gate.h"

namespace fastdense {
namespace {

// functor(i) for all elements, without a division for each.
template <typename Functor>
void run(const Functor& functor, int64_t count) {
  constexpr int64_t kGrain = 2048;
  at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t before = i / functor.block * functor.block, stop = std::min(end, before + functor.block);
#pragma omp simd
      for (int64_t k = i; k < stop; ++k) functor.element(k, k + before);
      i = stop;
    }
  });
}

at::Tensor highway_gate_cpu(const at::Tensor& input, const at::Tensor& projection, std::string_view activation) {
  const HighwayForwardCall call("highway_gate", input, projection, activation);
  if (call.output.numel() == 0) return call.output;
  dispatch_highway_gate(input.scalar_type(), activation,
                        [&](auto type, auto act) { run(call.functor(type, act), call.output.numel()); });
  return call.output;
}

std::tuple<at::Tensor, at::Tensor> highway_gate_backward_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                                                             const at::Tensor& projection,
                                                             std::string_view activation) {
  const HighwayBackwardCall call("_highway_gate_backward", grad_output, input, projection, activation);
  if (call.grad_input.numel() == 0) return {call.grad_input, call.grad_projection};
  dispatch_highway_gate(input.scalar_type(), activation,
                        [&](auto type, auto act) { run(call.functor(type, act), call.grad_input.numel()); });
  return {call.grad_input, call.grad_projection};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) {
  m.impl("highway_gate", &highway_gate_cpu);
  m.impl("_highway_gate_backward", &highway_gate_backward_cpu);
}

}  // namespace fastdense

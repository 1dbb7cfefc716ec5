// SPDX-License-Identifier: Apache-2.0
// The dual path stage ops but for the arithmetic: checks, allocation, empty inputs, dispatch.  A device gives
//   Engine::forward<T>(const DualPathArgs&, DualPathKeep, const at::Tensor& input, const DualPathOutputs&)
//   Engine::backward<T>(const DualPathArgs&, const DualPathSaved&, const at::Tensor& grad_output,
//                       const std::vector<bool>& needs, at::TensorList weights)
// with our storage type T; they register dual_path_stage<Engine> and dual_path_stage_backward<Engine>.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include <tuple>

#include "core/checks.h"
#include "core/storage.h"
#include "dual_path/dual_path.h"

namespace fastdense {

// What the forward op took and returned.
struct DualPathSaved {
  const at::Tensor &input, &out, &residuals, &a, &b, &mean, &var;
};

template <typename Engine>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dual_path_stage(
    const at::Tensor& input,  // [N, C_in, spatial]
    at::TensorList weights, at::ArrayRef<double> eps, int64_t num_blocks, bool projection, int64_t residual_channels,
    int64_t stride, std::string_view memory, std::string_view process_group) {
  [[maybe_unused]] const typename Engine::Guard guard(input.device());
  check_floating("dual_path_stage", "input", input);
  const DualPathArgs args = parse_dual_path(input.sizes(), input.options(), weights,
                                            {eps, num_blocks, projection, residual_channels, stride, process_group});
  const DualPathKeep keep = parse_dual_path_memory(memory);
  const DualPathOutputs o = allocate_dual_path(args, input.options(), keep);
  if (args.pixels() > 0 || !process_group.empty())  // the other processes wait for this one
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "dual_path_stage", [&] {
      Engine::template forward<typename Storage<scalar_t>::type>(args, keep, input, o);
    });
  return {o.out, o.residuals, o.a, o.b, o.mean, o.var};
}

// Gradients of the input and of every weight, empty where `needs_grad` says that none is wanted.
template <typename Engine>
std::vector<at::Tensor> dual_path_stage_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                                 const at::Tensor& out, const at::Tensor& residuals,
                                                 const at::Tensor& a, const at::Tensor& b, const at::Tensor& mean,
                                                 const at::Tensor& var, at::TensorList weights,
                                                 at::ArrayRef<double> eps, int64_t num_blocks, bool projection,
                                                 int64_t residual_channels, int64_t stride, c10::List<bool> needs_grad,
                                                 std::string_view process_group) {
  [[maybe_unused]] const typename Engine::Guard guard(input.device());
  const DualPathArgs args = parse_dual_path(input.sizes(), input.options(), weights,
                                            {eps, num_blocks, projection, residual_channels, stride, process_group});
  check_at_least("_dual_path_stage_backward", "needs_grad", int64_t(needs_grad.size()), int64_t(weights.size()) + 1);
  const std::vector<bool> needs(needs_grad.begin(), needs_grad.end());
  if (args.pixels() == 0 && process_group.empty()) {
    std::vector<at::Tensor> zeros{empty_channels_last(input.sizes(), input.options()).zero_()};
    for (size_t i = 0; i < weights.size(); ++i)
      zeros.push_back(needs[i + 1] ? at::zeros_like(weights[i]) : at::empty({0}, input.options()));
    return zeros;
  }
  std::vector<at::Tensor> grads;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "_dual_path_stage_backward", [&] {
    using T = typename Storage<scalar_t>::type;
    grads = Engine::template backward<T>(args, {input, out, residuals, a, b, mean, var}, grad_output, needs, weights);
  });
  return grads;
}

}  // namespace fastdense

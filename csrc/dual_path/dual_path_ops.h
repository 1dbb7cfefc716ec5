// SPDX-License-Identifier: Apache-2.0
// The dual path stage ops but for the arithmetic: checks, allocation, empty inputs, dispatch.  A device gives
//   Engine::forward<T>(const DualPathArgs&, DualPathKeep, const at::Tensor& input, const DualPathOutputs&)
//   Engine::backward<T>(const DualPathArgs&, const DualPathSaved&, const at::Tensor& grad_output,
//                       const std::vector<bool>& needs, at::TensorList weights)
// with our storage type T; they register dual_path_stage<Engine> and dual_path_stage_backward<Engine>.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <tuple>

#include "core/checks.h"
#include "core/storage.h"
#include "dual_path/dual_path.h"

namespace fastdense {

template <typename Engine>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dual_path_stage(
    const at::Tensor& input,  // [N, C_in, spatial]
    at::TensorList weights, at::ArrayRef<double> eps, int64_t num_blocks, bool projection, int64_t residual_channels,
    int64_t stride, std::string_view memory, std::string_view process_group, bool contiguous) {
  constexpr const char* kOp = "dual_path_stage";
  check_floating(kOp, "input", input);
  [[maybe_unused]] const typename Engine::Guard guard(input.device());
  const DualPathArgs args = parse_dual_path(kOp, input.sizes(), input.options(), weights,
                                            {eps, num_blocks, projection, residual_channels, stride, process_group});
  const DualPathKeep keep = parse_dual_path_memory(kOp, memory);
  const DualPathOutputs o = allocate_dual_path(args, input.options(), keep);
  if (!input.is_meta() && (args.pixels() > 0 || !process_group.empty()))  // the other processes wait for this one
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), kOp, [&] {
      Engine::template forward<typename Storage<scalar_t>::type>(args, keep, input, o);
    });
  return {contiguous ? o.out.contiguous() : o.out, o.residuals, o.a, o.b, o.mean, o.var};
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
  constexpr const char* kOp = "_dual_path_stage_backward";
  check_floating(kOp, "input", input);
  [[maybe_unused]] const typename Engine::Guard guard(input.device());
  const DualPathArgs args = parse_dual_path(kOp, input.sizes(), input.options(), weights,
                                            {eps, num_blocks, projection, residual_channels, stride, process_group});
  const DualPathSaved saved = check_dual_path_saved(kOp, args, grad_output, {input, out, residuals, a, b, mean, var});
  const std::vector<bool> needs = read_needs(kOp, needs_grad, weights, args.constants);
  if (input.is_meta() || (args.pixels() == 0 && process_group.empty()))
    return zero_gradients(empty_channels_last(input.sizes(), input.options()), weights, needs);
  std::vector<at::Tensor> grads;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), kOp, [&] {
    grads = Engine::template backward<typename Storage<scalar_t>::type>(args, saved, grad_output, needs, weights);
  });
  return grads;
}

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
// Front half of norm_relu_max_pool and its backward, shared by all devices: checks, layout, allocation, empty inputs,
// dispatch.  Everything lies in memory like the input: channels innermost if that is so there, else contiguous.  A
// device gives
//   Engine::forward<T>(const NormPoolArgs&, const at::Tensor& input, const NormPoolOutputs&)
//   Engine::backward<T>(const NormPoolArgs&, const NormPoolSaved&, const at::Tensor& grad_output,
//                       const std::vector<bool>& needs, at::TensorList norm)
// with our storage type T.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "core/checks.h"
#include "core/layout.h"
#include "core/statistics.h"
#include "core/storage.h"
#include "core/sync_batch_norm.h"
#include "core/weights.h"
#include "norm_relu_max_pool/norm_relu_max_pool_math.h"

namespace fastdense {

struct NormPoolArgs {
  explicit NormPoolArgs(const at::Tensor& input) : layout(input) {}

  Layout layout;
  NormArgs norm;
  MaxPoolGeometry g{};
  int64_t batch = 0, channels = 0;
  std::vector<int64_t> pooled_sizes;  // [N, C, pooled]
  std::string process_group;          // see SyncBatchNorm
  std::vector<int64_t> constants;     // positions of the norm's tensors without a gradient

  int64_t values() const { return batch * g.pixels(); }  // behind each mean
  bool empty() const { return batch * channels == 0; }
};

// kernel_size, stride and padding as a pool's, one number an axis.
inline MaxPoolGeometry parse_max_pool(const char* op, at::IntArrayRef size, at::IntArrayRef kernel_size,
                                      at::IntArrayRef stride, at::IntArrayRef padding) {
  check_entries(op, "kernel_size", kernel_size, int64_t(size.size()));
  check_entries(op, "stride", stride, int64_t(size.size()));
  check_entries(op, "padding", padding, int64_t(size.size()));
  MaxPoolGeometry g{{1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
  for (size_t axis = 0; axis < size.size(); ++axis) {
    const size_t d = axis + 3 - size.size();
    check_at_least(op, "every spatial size", size[axis], 1);
    check_at_least(op, "kernel_size", kernel_size[axis], 1);
    check_at_most(op, "kernel_size", kernel_size[axis], kNoIndex);
    check_at_least(op, "stride", stride[axis], 1);
    check_at_least(op, "padding", padding[axis], 0);
    check_at_most(op, "padding", padding[axis], kernel_size[axis] / 2);
    check_at_least(op, "padded spatial size", size[axis] + 2 * padding[axis], kernel_size[axis]);
    g.size[d] = size[axis];
    g.window[d] = kernel_size[axis];
    g.stride[d] = std::min(stride[axis], size[axis] + 2 * padding[axis]);  // behind which there is no window
    g.padding[d] = padding[axis];
    g.pooled[d] = (size[axis] + 2 * padding[axis] - kernel_size[axis]) / stride[axis] + 1;
  }
  TORCH_CHECK_VALUE(g.volume() <= kNoIndex, op, ": expected kernel_size to have at most ", kNoIndex, " positions, got ",
                    kernel_size);
  return g;
}

inline NormPoolArgs parse_norm_relu_max_pool(const char* op, const at::Tensor& input, at::TensorList norm, double eps,
                                             at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                             at::IntArrayRef padding, std::string_view process_group) {
  check_rank_between(op, "input", input, 3, 5);
  check_entries(op, "norm", norm.size(), 4);
  check_process_group(op, process_group);
  NormPoolArgs args(input);
  args.g = parse_max_pool(op, input.sizes().slice(2), kernel_size, stride, padding);
  args.batch = input.size(0);
  args.channels = input.size(1);
  args.process_group = process_group;
  args.pooled_sizes = {args.batch, args.channels};
  args.pooled_sizes.insert(args.pooled_sizes.end(), args.g.pooled + 5 - input.dim(), args.g.pooled + 3);
  const at::TensorOptions options = input.options();
  WeightReader reader(op, norm, eps, options);
  args.norm = reader.norm("norm", args.channels);
  args.constants = reader.constants();
  TORCH_CHECK_VALUE(args.norm.frozen() || args.values() != 1 || !process_group.empty(), op,
                    ": expected input to have more than 1 value per channel when training, got shape ", input.sizes());
  return args;
}

struct NormPoolOutputs {
  at::Tensor y, indices, mean, var;
};

// What forward saved for backward.
struct NormPoolSaved {
  at::Tensor input, indices, mean, var;
};

// input [N, C, spatial] -> y [N, C, pooled], indices of the same shape or [0], mean and var [C]
template <typename Engine>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_relu_max_pool(
    const at::Tensor& input, at::TensorList norm, double eps, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, bool keep_indices, std::string_view process_group) {
  constexpr const char* kOp = "norm_relu_max_pool";
  check_floating(kOp, "input", input);
  [[maybe_unused]] const typename Engine::Guard guard(input.device());
  const NormPoolArgs args =
      parse_norm_relu_max_pool(kOp, input, norm, eps, kernel_size, stride, padding, process_group);
  const at::TensorOptions options = input.options(), bytes = options.dtype(at::kByte);
  const auto statistics = options.dtype(statistics_dtype(input.scalar_type()));
  const bool computed = !args.norm.frozen() && !args.empty();
  const auto [mean, var] = allocate_statistics({args.channels}, statistics, computed);
  const NormPoolOutputs o{args.layout.empty(args.pooled_sizes, options),
                          keep_indices ? args.layout.empty(args.pooled_sizes, bytes) : at::empty({0}, bytes), mean,
                          var};
  if (!input.is_meta() && (!args.empty() || !process_group.empty()))  // the other processes wait for this one
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), kOp, [&] {
      Engine::template forward<typename Storage<scalar_t>::type>(args, input, o);
    });
  return {o.y, o.indices, o.mean, o.var};
}

// Gradients of the input and of the norm's tensors, empty where `needs_grad` says that none is wanted.
template <typename Engine>
std::vector<at::Tensor> norm_relu_max_pool_backward(const at::Tensor& grad_output,  // [N, C, pooled]
                                                    const at::Tensor& input,        // [N, C, spatial]
                                                    const at::Tensor& indices,      // [N, C, pooled]
                                                    const at::Tensor& mean, const at::Tensor& var, at::TensorList norm,
                                                    double eps, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                                    at::IntArrayRef padding, c10::List<bool> needs_grad,
                                                    std::string_view process_group) {
  constexpr const char* kOp = "_norm_relu_max_pool_backward";
  check_floating(kOp, "input", input);
  [[maybe_unused]] const typename Engine::Guard guard(input.device());
  const NormPoolArgs args =
      parse_norm_relu_max_pool(kOp, input, norm, eps, kernel_size, stride, padding, process_group);
  check_like(kOp, "grad_output", grad_output, "input", input);
  check_shape(kOp, "grad_output", grad_output, args.pooled_sizes);
  check_dtype(kOp, "winners", indices, at::kByte);
  check_same_device(kOp, "winners", indices, "input", input);
  check_shape(kOp, "winners", indices, args.pooled_sizes);
  check_statistics(kOp, "mean", mean, args.channels, "input", input);
  check_statistics(kOp, "var", var, args.channels, "input", input);
  const std::vector<bool> needs = read_needs(kOp, needs_grad, norm, args.constants);
  if (input.is_meta() || (args.empty() && process_group.empty()))
    return zero_gradients(args.layout.empty(input.sizes(), input.options()), norm, needs);
  const NormPoolSaved saved{input, indices, mean.contiguous(), var.contiguous()};
  std::vector<at::Tensor> grads;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), kOp, [&] {
    grads = Engine::template backward<typename Storage<scalar_t>::type>(args, saved, grad_output, needs, norm);
  });
  return grads;
}

}  // namespace fastdense

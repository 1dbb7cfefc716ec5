// SPDX-License-Identifier: Apache-2.0
// The dense block ops but for the arithmetic: checks, allocation, empty inputs, dispatch.  A device gives
//   Engine::forward<T>(const DenseBlockArgs&, const at::Tensor& input, const std::optional<at::Tensor>& seed,
//                      const DenseBlockOutputs&)
//   Engine::backward<T>(const DenseBlockArgs&, const DenseBlockSaved&, const at::Tensor& grad_output,
//                       const std::optional<at::Tensor>& seed, const std::vector<bool>& needs, at::TensorList weights)
// with our storage type T; they register dense_block<Engine> and dense_block_backward<Engine>.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include <tuple>

#include "core/checks.h"
#include "core/storage.h"
#include "dense_block/dense_block.h"

namespace fastdense {

// What forward saved for backward.
struct DenseBlockSaved {
  const at::Tensor &buffer, &mean, &var, &z;
};

template <typename Engine>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dense_block(
    const at::Tensor& input,  // [N, C0, spatial]
    at::TensorList weights, at::ArrayRef<double> eps, int64_t num_layers, bool bottleneck, std::string_view tail,
    double drop_rate, const std::optional<at::Tensor>& seed, bool keep_bottleneck, std::string_view process_group) {
  [[maybe_unused]] const typename Engine::Guard guard(input.device());
  check_floating("dense_block", "input", input);
  const DenseBlockArgs args = parse_dense_block(input.sizes(), input.options(), weights,
                                                {eps, num_layers, bottleneck, tail, drop_rate, seed, process_group});
  const DenseBlockOutputs o = allocate_dense_block(args, input.options(), keep_bottleneck);
  if (args.pixels() > 0 || !process_group.empty())  // the other processes wait for this one
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "dense_block", [&] {
      Engine::template forward<typename Storage<scalar_t>::type>(args, input, seed, o);
    });
  const bool has_tail = args.tail != Tail::kNone;
  return {has_tail ? o.out : o.buffer, has_tail ? o.buffer : at::empty({0}, input.options()), o.mean, o.var, o.z};
}

// Gradients of the input and of every weight, empty where `needs_grad` says that none is wanted.
template <typename Engine>
std::vector<at::Tensor> dense_block_backward(const at::Tensor& grad_output,  // shape of the block's output
                                             const at::Tensor& buffer,       // [N, C, spatial], channels innermost
                                             const at::Tensor& mean, const at::Tensor& var, const at::Tensor& z,
                                             at::TensorList weights, at::ArrayRef<double> eps, int64_t num_layers,
                                             bool bottleneck, std::string_view tail, double drop_rate,
                                             const std::optional<at::Tensor>& seed, int64_t in_channels,
                                             c10::List<bool> needs_grad, std::string_view process_group) {
  [[maybe_unused]] const typename Engine::Guard guard(buffer.device());
  check_at_most("_dense_block_backward", "in_channels", in_channels, buffer.size(1));
  std::vector<int64_t> sizes = buffer.sizes().vec();
  sizes[1] = in_channels;
  const DenseBlockArgs args = parse_dense_block(sizes, buffer.options(), weights,
                                                {eps, num_layers, bottleneck, tail, drop_rate, seed, process_group});
  check_at_least("_dense_block_backward", "needs_grad", int64_t(needs_grad.size()), int64_t(weights.size()) + 1);
  const std::vector<bool> needs(needs_grad.begin(), needs_grad.end());
  if (args.pixels() == 0 && process_group.empty()) {
    std::vector<at::Tensor> zeros{empty_channels_last(sizes, buffer.options())};
    for (size_t i = 0; i < weights.size(); ++i)
      zeros.push_back(needs[i + 1] ? at::zeros_like(weights[i]) : at::empty({0}, buffer.options()));
    return zeros;
  }
  std::vector<at::Tensor> grads;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, buffer.scalar_type(), "_dense_block_backward", [&] {
    grads = Engine::template backward<typename Storage<scalar_t>::type>(args, {buffer, mean, var, z}, grad_output, seed,
                                                                        needs, weights);
  });
  return grads;
}

}  // namespace fastdense

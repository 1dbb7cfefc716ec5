// SPDX-License-Identifier: Apache-2.0
// The dense block ops but for the arithmetic: checks, allocation, empty inputs, dispatch.  A device gives
//   Engine::forward<T>(const DenseBlockArgs&, const at::Tensor& input, const std::optional<at::Tensor>& seed,
//                      const DenseBlockOutputs&)
//   Engine::backward<T>(const DenseBlockArgs&, const DenseBlockSaved&, const at::Tensor& grad_output,
//                       const std::optional<at::Tensor>& seed, const std::vector<bool>& needs, at::TensorList weights)
// with our storage type T, and registers dense_block<Engine> and dense_block_backward<Engine>.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include <tuple>

#include "core/checks.h"
#include "core/storage.h"
#include "dense_block/dense_block.h"

namespace fastdense {

template <typename Engine>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dense_block(
    const at::Tensor& input,  // [N, C0, spatial]
    at::TensorList weights, at::ArrayRef<double> eps, int64_t num_layers, bool bottleneck, std::string_view tail,
    double drop_rate, const std::optional<at::Tensor>& seed, bool keep_bottleneck, std::string_view process_group,
    bool contiguous, std::string_view activations, at::ArrayRef<double> activation_parameters, at::IntArrayRef groups,
    bool recompute) {
  constexpr const char* kOp = "dense_block";
  check_floating(kOp, "input", input);
  [[maybe_unused]] const typename Engine::Guard guard(input.device());
  DenseBlockArgs args = parse_dense_block(
      kOp, input.sizes(), input.options(), weights,
      {eps, num_layers, bottleneck, tail, drop_rate, seed, process_group, activations, activation_parameters, groups});
  args.recompute = recompute;
  const DenseBlockOutputs o = allocate_dense_block(args, input.options(), keep_bottleneck);
  if (!input.is_meta() && (args.pixels() > 0 || !process_group.empty()))  // the other processes wait for this one
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), kOp, [&] {
      Engine::template forward<typename Storage<scalar_t>::type>(args, input, seed, o);
    });
  const bool has_tail = args.tail != Tail::kNone;
  const at::Tensor& out = has_tail ? o.out : o.buffer;
  return {contiguous ? out.contiguous() : out, has_tail ? o.buffer : at::empty({0}, input.options()), o.mean, o.var,
          o.z};
}

// Of what a dropped layer is given, but does not run.
inline void set_zero_gradients(const LayerArgs& layer, const std::vector<bool>& needs, std::vector<at::Tensor>& grads) {
  const auto set = [&](const at::Tensor& weight, int64_t at) {
    if (weight.defined() && needs[size_t(at) + 1]) grads[size_t(at) + 1] = at::zeros_like(weight);
  };
  for (const NormArgs* norm : {&layer.norm1, &layer.norm2}) {
    set(norm->weight, norm->at);
    set(norm->bias, norm->at + 1);
  }
  for (const ConvArgs* extra : {&layer.act1.slope, &layer.act2.slope, &layer.bias1, &layer.bias2})
    set(extra->weight, extra->at);
}

// Gradients of the input and of every weight, empty where `needs_grad` says that none is wanted.
template <typename Engine>
std::vector<at::Tensor> dense_block_backward(const at::Tensor& grad_output,  // shape of the block's output
                                             const at::Tensor& buffer,       // [N, C, spatial]
                                             const at::Tensor& mean, const at::Tensor& var, const at::Tensor& z,
                                             at::TensorList weights, at::ArrayRef<double> eps, int64_t num_layers,
                                             bool bottleneck, std::string_view tail, double drop_rate,
                                             const std::optional<at::Tensor>& seed, int64_t in_channels,
                                             c10::List<bool> needs_grad, std::string_view process_group,
                                             std::string_view activations, at::ArrayRef<double> activation_parameters,
                                             at::IntArrayRef groups) {
  constexpr const char* kOp = "_dense_block_backward";
  check_floating(kOp, "buffer", buffer);
  [[maybe_unused]] const typename Engine::Guard guard(buffer.device());
  check_rank_between(kOp, "buffer", buffer, 3, 5);
  check_at_most(kOp, "in_channels", in_channels, buffer.size(1));
  std::vector<int64_t> sizes = buffer.sizes().vec();
  sizes[1] = in_channels;
  const DenseBlockArgs args = parse_dense_block(
      kOp, sizes, buffer.options(), weights,
      {eps, num_layers, bottleneck, tail, drop_rate, seed, process_group, activations, activation_parameters, groups});
  const DenseBlockSaved saved = check_dense_block_saved(kOp, args, grad_output, {buffer, mean, var, z});
  const std::vector<bool> needs = read_needs(kOp, needs_grad, weights, args.constants);
  if (buffer.is_meta() || (args.pixels() == 0 && process_group.empty()))
    return zero_gradients(empty_channels_last(sizes, buffer.options()), weights, needs);
  std::vector<at::Tensor> grads;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, buffer.scalar_type(), kOp, [&] {
    grads = Engine::template backward<typename Storage<scalar_t>::type>(args, saved, grad_output, seed, needs, weights);
  });
  for (const LayerArgs& layer : args.layers)
    if (layer.dropped) set_zero_gradients(layer, needs, grads);
  return grads;
}

}  // namespace fastdense

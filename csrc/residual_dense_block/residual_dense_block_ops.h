// SPDX-License-Identifier: Apache-2.0
// The residual dense block ops but for the arithmetic: checks, allocation, empty inputs, dispatch.  A device gives
//   Engine::forward<T>(const ResidualDenseBlockArgs&, const at::Tensor& outer, const ResidualDenseBlockOutputs&)
//   Engine::backward<T>(const ResidualDenseBlockArgs&, const at::Tensor& buffer, const at::Tensor& grad_output,
//                       const std::vector<bool>& needs, at::TensorList weights)
// with our storage type T, all tensors with channels innermost, the input in the buffer, and `outer` undefined where
// there is none; they register residual_dense_block<Engine> and residual_dense_block_backward<Engine>.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <tuple>

#include "core/checks.h"
#include "core/huge_pages.h"
#include "core/storage.h"
#include "residual_dense_block/residual_dense_block.h"

namespace fastdense {

// Without a fusion both are the same tensor.
struct ResidualDenseBlockOutputs {
  const at::Tensor &out, &buffer;
};

// The result and the buffer, which is nothing where it is the result.
template <typename Engine>
std::tuple<at::Tensor, at::Tensor> residual_dense_block(const at::Tensor& input,  // [N, C0, H, W]
                                                        at::TensorList weights, at::IntArrayRef first_channels,
                                                        bool fusion, double negative_slope, double scale,
                                                        const std::optional<at::Tensor>& outer,  // [N, C0, H, W]
                                                        double outer_scale, bool contiguous,
                                                        bool /* recompute: autograd reads it */) {
  constexpr const char* kOp = "residual_dense_block";
  check_floating(kOp, "input", input);
  [[maybe_unused]] const typename Engine::Guard guard(input.device());
  const ResidualDenseBlockArgs args = parse_residual_dense_block(
      kOp, input.sizes(), input.options(), weights, {first_channels, fusion, negative_slope, scale, outer_scale});
  check_outer(kOp, args, input, outer);
  const at::Tensor buffer = with_huge_pages(empty_channels_last(args.sizes(args.channels()), input.options()));
  const at::Tensor out = fusion ? with_huge_pages(empty_channels_last(input.sizes(), input.options())) : buffer;
  if (has_values(buffer)) {
    buffer.narrow(1, 0, args.in_channels).copy_(input);
    const at::Tensor outer_rows = outer.has_value() ? to_channels_last(*outer) : at::Tensor();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), kOp, [&] {
      Engine::template forward<typename Storage<scalar_t>::type>(args, outer_rows, {out, buffer});
    });
  }
  return {contiguous ? out.contiguous() : out, fusion ? buffer : at::empty({0}, input.options())};
}

// Gradients of the input and of every weight, empty where `needs_grad` says that none is wanted.  That of `outer` is
// grad_output itself.
template <typename Engine>
std::vector<at::Tensor> residual_dense_block_backward(const at::Tensor& grad_output,  // of the result's shape
                                                      const at::Tensor& buffer,       // [N, C, H, W]
                                                      at::TensorList weights, at::IntArrayRef first_channels,
                                                      bool fusion, double negative_slope, double scale,
                                                      double outer_scale, int64_t in_channels,
                                                      c10::List<bool> needs_grad) {
  constexpr const char* kOp = "_residual_dense_block_backward";
  check_floating(kOp, "buffer", buffer);
  [[maybe_unused]] const typename Engine::Guard guard(buffer.device());
  check_rank(kOp, "buffer", buffer, 4);
  check_at_most(kOp, "in_channels", in_channels, buffer.size(1));
  std::vector<int64_t> sizes = buffer.sizes().vec();
  sizes[1] = in_channels;
  const ResidualDenseBlockArgs args = parse_residual_dense_block(
      kOp, sizes, buffer.options(), weights, {first_channels, fusion, negative_slope, scale, outer_scale});
  check_channels(kOp, "buffer", buffer, args.channels());
  check_like(kOp, "grad_output", grad_output, "buffer", buffer);
  check_shape(kOp, "grad_output", grad_output, fusion ? at::IntArrayRef(sizes) : buffer.sizes());
  const std::vector<bool> needs = read_needs(kOp, needs_grad, weights, {});
  if (!has_values(buffer)) return zero_gradients(empty_channels_last(sizes, buffer.options()), weights, needs);
  const at::Tensor grad = to_channels_last(grad_output), saved = to_channels_last(buffer);
  std::vector<at::Tensor> grads;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, buffer.scalar_type(), kOp, [&] {
    grads = Engine::template backward<typename Storage<scalar_t>::type>(args, saved, grad, needs, weights);
  });
  return grads;
}

}  // namespace fastdense

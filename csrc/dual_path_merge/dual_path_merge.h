// SPDX-License-Identifier: Apache-2.0
// Front half of dual_path_merge and dual_path_split, shared by the CPU and the CUDA files: checks, layout, allocation.
// All tensors lie in memory like the first: channels innermost if that is so there, else contiguous.  Either way a row
// of the functors is what lies contiguously behind the batch and, with channels innermost, behind a pixel.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "core/checks.h"
#include "core/layout.h"
#include "core/storage.h"
#include "dual_path_merge/dual_path_merge_math.h"

namespace fastdense {

inline std::vector<int64_t> with_channels(at::IntArrayRef sizes, int64_t channels) {
  std::vector<int64_t> result = sizes.vec();
  result[1] = channels;
  return result;
}

// Elements of a row in units of channels.
inline int64_t row_elements_per_channel(const Layout& layout, const at::Tensor& t) {
  int64_t inner = 1;
  for (int64_t d = 2; d < t.dim() && !layout.channels_last; ++d) inner *= t.size(d);
  return inner;
}

// run(functor, count) does the work for DualPathMerge<T>.
template <typename Run>
at::Tensor dual_path_merge(const at::Tensor& input, const at::Tensor& features, int64_t residual, const Run& run) {
  constexpr const char* kOp = "dual_path_merge";
  check_floating(kOp, "input", input);
  check_like(kOp, "features", features, "input", input);
  check_rank_between(kOp, "input", input, 2, 5);
  check_rank(kOp, "features", features, input.dim());
  check_at_least(kOp, "residual_channels", residual, 0);
  check_at_most(kOp, "residual_channels", residual, input.size(1));
  check_at_most(kOp, "residual_channels", residual, features.size(1));
  check_shape(kOp, "features", features, with_channels(input.sizes(), features.size(1)));
  const Layout layout(input);
  const int64_t fresh = features.size(1) - residual, inner = row_elements_per_channel(layout, input);
  const at::Tensor x = layout.arrange(input), y = layout.arrange(features);
  const at::Tensor out = layout.empty(with_channels(input.sizes(), input.size(1) + fresh), input.options());
  if (!has_values(out)) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), kOp, [&] {
    using T = typename Storage<scalar_t>::type;
    run(DualPathMerge<T>{static_cast<const T*>(x.const_data_ptr()),
                         static_cast<const T*>(y.const_data_ptr()),
                         static_cast<T*>(out.mutable_data_ptr()),
                         {residual * inner, (input.size(1) - residual) * inner, fresh * inner}},
        out.numel());
  });
  return out;
}

// Likewise for DualPathSplit<T>.
template <typename Run>
std::tuple<at::Tensor, at::Tensor> dual_path_split(const at::Tensor& grad, int64_t in_channels, int64_t residual,
                                                   const Run& run) {
  constexpr const char* kOp = "dual_path_split";
  check_floating(kOp, "input", grad);
  check_rank_between(kOp, "input", grad, 2, 5);
  check_at_least(kOp, "residual_channels", residual, 0);
  check_at_least(kOp, "channels", in_channels, residual);
  check_at_most(kOp, "channels", in_channels, grad.size(1));
  const Layout layout(grad);
  const int64_t fresh = grad.size(1) - in_channels, inner = row_elements_per_channel(layout, grad);
  const at::Tensor g = layout.arrange(grad);
  const at::Tensor x = layout.empty(with_channels(grad.sizes(), in_channels), grad.options());
  const at::Tensor y = layout.empty(with_channels(grad.sizes(), residual + fresh), grad.options());
  if (!has_values(grad)) return {x, y};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), kOp, [&] {
    using T = typename Storage<scalar_t>::type;
    run(DualPathSplit<T>{static_cast<const T*>(g.const_data_ptr()),
                         static_cast<T*>(x.mutable_data_ptr()),
                         static_cast<T*>(y.mutable_data_ptr()),
                         {residual * inner, (in_channels - residual) * inner, fresh * inner}},
        grad.numel());
  });
  return {x, y};
}

}  // namespace fastdense

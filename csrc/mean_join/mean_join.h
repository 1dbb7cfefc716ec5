// SPDX-License-Identifier: Apache-2.0
// Front half of mean_join, shared by the CPU and the CUDA file: checks, layout, allocation. All tensors lie in memory
// like the first: channels innermost if that is so there, else contiguous.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "core/checks.h"
#include "core/layout.h"
#include "core/storage.h"
#include "mean_join/mean_join_math.h"

namespace fastdense {

inline void check_mean_join(const char* op, at::TensorList inputs) {
  TORCH_CHECK_VALUE(inputs.size() <= size_t(kMaxJoined), op, ": expected inputs to be 1 to ", kMaxJoined,
                    " tensors, got ", inputs.size());
  check_floating(op, "inputs[0]", inputs[0]);
  TORCH_CHECK_VALUE(inputs[0].dim() >= 2, op, ": expected inputs[0] to have at least 2 dimensions, got shape ",
                    inputs[0].sizes());
  for (size_t j = 1; j < inputs.size(); ++j) {
    const std::string name = "inputs[" + std::to_string(j) + "]";
    check_like(op, name.c_str(), inputs[j], "inputs[0]", inputs[0]);
    check_shape(op, name.c_str(), inputs[j], inputs[0].sizes());
  }
}

// inputs: m of [N, C, spatial] -> [N, C, spatial]; run(functor, count) does the work for MeanJoin<T>.
template <typename Run>
at::Tensor mean_join(at::TensorList inputs, const Run& run) {
  constexpr const char* kOp = "mean_join";
  check_mean_join(kOp, inputs);
  const Layout layout(inputs[0]);
  const at::Tensor out = layout.empty(inputs[0].sizes(), inputs[0].options());
  if (!has_values(out)) return out;
  std::vector<at::Tensor> arranged;
  for (const at::Tensor& input : inputs) arranged.push_back(layout.arrange(input));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), kOp, [&] {
    using T = typename Storage<scalar_t>::type;
    MeanJoin<T> functor{{}, static_cast<T*>(out.mutable_data_ptr()), static_cast<int>(arranged.size())};
    for (size_t j = 0; j < arranged.size(); ++j)
      functor.inputs[j] = static_cast<const T*>(arranged[j].const_data_ptr());
    run(functor, out.numel());
  });
  return out;
}

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
// Mean and variance that an operator returns.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/_foreach_zero.h>
#include <ATen/ops/empty.h>

#include <array>

namespace fastdense {

// {mean, var}; zeros where not all of them will be computed, by one kernel on CUDA.
inline std::array<at::Tensor, 2> allocate_statistics(at::IntArrayRef sizes, const at::TensorOptions& options,
                                                     bool all_computed) {
  const std::array<at::Tensor, 2> both{at::empty(sizes, options), at::empty(sizes, options)};
  if (!all_computed) at::_foreach_zero_(both);
  return both;
}

}  // namespace fastdense

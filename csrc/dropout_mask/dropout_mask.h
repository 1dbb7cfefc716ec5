// SPDX-License-Identifier: Apache-2.0
// Front half of dropout_mask, shared by the CPU and the CUDA file: checks, allocation, parameters.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/checks.h"
#include "core/dropout_math.h"
#include "core/layout.h"

namespace fastdense {

// seed [] int64 -> mask [rows, channels] bool
inline at::Tensor dropout_mask_prepare(const at::Tensor& seed, int64_t layer, int64_t rows, int64_t channels,
                                       double drop_rate) {
  constexpr const char* kOp = "dropout_mask";
  check_seed(kOp, seed);
  check_at_least(kOp, "layer", layer, 0);
  check_at_most(kOp, "layer", layer, std::numeric_limits<uint32_t>::max());
  check_at_least(kOp, "rows", rows, 0);
  check_at_least(kOp, "channels", channels, 0);
  check_at_most(kOp, "rows", rows, std::numeric_limits<int64_t>::max() / std::max<int64_t>(1, channels));
  check_probability(kOp, "drop_rate", drop_rate);
  return at::empty({rows, channels}, seed.options().dtype(at::kBool));
}

inline DropoutMask dropout_mask_params(const at::Tensor& seed, const at::Tensor& mask, int64_t layer,
                                       double drop_rate) {
  return {seed.const_data_ptr<int64_t>(), mask.mutable_data_ptr<bool>(), mask.numel(), uint32_t(layer),
          dropout_threshold(drop_rate)};
}

}  // namespace fastdense

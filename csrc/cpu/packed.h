// SPDX-License-Identifier: Apache-2.0
// Weights that are packed once for many calls: a header [1] int64 comes first, the instruction set.  Panels mean
// nothing to another one, and are never stored.
#pragma once

#include <ATen/ops/full.h>

#include "core/checks.h"
#include "cpu/simd/isa.h"

namespace fastdense {

inline at::Tensor packed_header(const at::TensorOptions& options) {
  return at::full({1}, int64_t(current_isa()), options.dtype(at::kLong));
}

inline void check_packed(const char* op, const char* name, const at::Tensor& t, at::ScalarType dtype,
                         at::IntArrayRef shape) {
  check_dtype(op, name, t, dtype);
  check_shape(op, name, t, shape);
  TORCH_CHECK_VALUE(t.device().is_cpu() || t.is_meta(), op, ": expected ", name, " to be on the CPU, got ", t.device());
}

inline void check_packed_header(const char* op, const at::Tensor& t) {
  check_packed(op, "packed header", t, at::kLong, {1});
  if (t.is_meta()) return;
  const int64_t isa = *t.contiguous().const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(isa == int64_t(current_isa()), op, ": expected packed to be made for ", isa_name(current_isa()),
                    ", got instruction set ", isa, "; pack again");
}

}  // namespace fastdense

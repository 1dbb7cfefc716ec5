// SPDX-License-Identifier: Apache-2.0
// Argument checks of the ops' front halves, all in the form
//   <op>: expected <arg> to <be ...>, got <value>
// Values and shapes raise ValueError in Python, dtypes TypeError.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <string>

namespace fastdense {

// A copy: older versions of torch return temporaries.
inline std::string dtype_name(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

inline void check_dtype(const char* op, const char* arg, const at::Tensor& tensor, at::ScalarType expected) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == expected, op, ": expected ", arg, " to be ", dtype_name(expected), ", got ",
                   dtype_name(tensor.scalar_type()));
}

inline void check_floating(const char* op, const char* arg, const at::Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16, op,
                   ": expected ", arg, " to be float32, float64, float16 or bfloat16, got ", dtype_name(dtype));
}

inline void check_same_dtype(const char* op, const char* arg, const at::Tensor& tensor, const char* like_arg,
                             const at::Tensor& like) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), op, ": expected ", arg, " to be ",
                   dtype_name(like.scalar_type()), " like ", like_arg, ", got ", dtype_name(tensor.scalar_type()));
}

inline void check_same_device(const char* op, const char* arg, const at::Tensor& tensor, const char* like_arg,
                              const at::Tensor& like) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), op, ": expected ", arg, " to be on ", like.device(), " like ",
                    like_arg, ", got ", tensor.device());
}

inline void check_rank_between(const char* op, const char* arg, const at::Tensor& tensor, int64_t lowest,
                               int64_t highest) {
  TORCH_CHECK_VALUE(lowest <= tensor.dim() && tensor.dim() <= highest, op, ": expected ", arg, " to have ",
                    lowest == highest ? c10::str(lowest) : c10::str(lowest, " to ", highest), " dimensions, got shape ",
                    tensor.sizes());
}

inline void check_rank(const char* op, const char* arg, const at::Tensor& tensor, int64_t rank) {
  check_rank_between(op, arg, tensor, rank, rank);
}

// Of the generator of dropout masks.
inline void check_seed(const char* op, const at::Tensor& seed) {
  check_dtype(op, "seed", seed, at::kLong);
  check_rank(op, "seed", seed, 0);
}

// tensor [N, C, ...]
inline void check_channels(const char* op, const char* arg, const at::Tensor& tensor, int64_t channels) {
  TORCH_CHECK_VALUE(tensor.dim() >= 2 && tensor.size(1) == channels, op, ": expected ", arg, " to have ", channels,
                    " channels in dimension 1, got shape ", tensor.sizes());
}

inline void check_shape(const char* op, const char* arg, const at::Tensor& tensor, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, op, ": expected ", arg, " to have shape ", expected, ", got ",
                    tensor.sizes());
}

inline void check_at_least(const char* op, const char* arg, int64_t value, int64_t lowest) {
  TORCH_CHECK_VALUE(value >= lowest, op, ": expected ", arg, " to be at least ", lowest, ", got ", value);
}

inline void check_at_most(const char* op, const char* arg, int64_t value, int64_t highest) {
  TORCH_CHECK_VALUE(value <= highest, op, ": expected ", arg, " to be at most ", highest, ", got ", value);
}

inline void check_probability(const char* op, const char* arg, double value) {
  TORCH_CHECK_VALUE(0 <= value && value <= 1, op, ": expected ", arg, " to be a probability in [0, 1], got ", value);
}

}  // namespace fastdense

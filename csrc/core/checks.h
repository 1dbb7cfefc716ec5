// SPDX-License-Identifier: Apache-2.0
// Argument checks of the ops' front halves, all in the form
//   <op>: expected <arg> to <be ...>, got <value>
// Values and shapes raise ValueError in Python, dtypes TypeError.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <ostream>
#include <string>

namespace fastdense {

// A copy: older versions of torch return temporaries.
inline std::string dtype_name(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

// The name of an argument, perhaps in two parts, which are put together for errors only.
struct ArgName {
  ArgName(const char* name, const char* suffix = "") : name(name), suffix(suffix) {}
  friend std::ostream& operator<<(std::ostream& to, const ArgName& arg) { return to << arg.name << arg.suffix; }
  const char *name, *suffix;
};

// None arrives as an undefined tensor.
inline void check_given(const char* op, const ArgName& arg, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.defined(), op, ": expected ", arg, " to be a tensor, got None");
}

// Of statistics of tensors of a type.
inline at::ScalarType statistics_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

inline void check_dtype(const char* op, const char* arg, const at::Tensor& tensor, at::ScalarType expected) {
  check_given(op, arg, tensor);
  TORCH_CHECK_TYPE(tensor.scalar_type() == expected, op, ": expected ", arg, " to be ", dtype_name(expected), ", got ",
                   dtype_name(tensor.scalar_type()));
}

inline void check_floating(const char* op, const ArgName& arg, const at::Tensor& tensor) {
  check_given(op, arg, tensor);
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16, op,
                   ": expected ", arg, " to be float32, float64, float16 or bfloat16, got ", dtype_name(dtype));
}

inline void check_same_dtype(const char* op, const char* arg, const at::Tensor& tensor, const char* like_arg,
                             const at::Tensor& like) {
  check_given(op, arg, tensor);
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), op, ": expected ", arg, " to be ",
                   dtype_name(like.scalar_type()), " like ", like_arg, ", got ", dtype_name(tensor.scalar_type()));
}

inline void check_same_device(const char* op, const char* arg, const at::Tensor& tensor, const char* like_arg,
                              const at::Tensor& like) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), op, ": expected ", arg, " to be on ", like.device(), " like ",
                    like_arg, ", got ", tensor.device());
}

inline void check_like(const char* op, const char* arg, const at::Tensor& tensor, const char* like_arg,
                       const at::Tensor& like) {
  check_same_dtype(op, arg, tensor, like_arg, like);
  check_same_device(op, arg, tensor, like_arg, like);
}

inline void check_rank_between(const char* op, const char* arg, const at::Tensor& tensor, int64_t lowest,
                               int64_t highest) {
  check_given(op, arg, tensor);
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

inline void check_shape(const char* op, const ArgName& arg, const at::Tensor& tensor, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, op, ": expected ", arg, " to have shape ", expected, ", got ",
                    tensor.sizes());
}

// mean or var [n], as an op on tensors like `like` returns them.
inline void check_statistics(const char* op, const char* arg, const at::Tensor& tensor, at::IntArrayRef shape,
                             const char* like_arg, const at::Tensor& like) {
  check_dtype(op, arg, tensor, statistics_dtype(like.scalar_type()));
  check_same_device(op, arg, tensor, like_arg, like);
  check_shape(op, arg, tensor, shape);
}

// Of a list.
inline void check_entries(const char* op, const char* arg, size_t entries, int64_t expected) {
  TORCH_CHECK_VALUE(int64_t(entries) == expected, op, ": expected ", arg, " to have ", expected, " entries, got ",
                    entries);
}

inline void check_entries(const char* op, const char* arg, at::IntArrayRef numbers, int64_t expected) {
  TORCH_CHECK_VALUE(int64_t(numbers.size()) == expected, op, ": expected ", arg, " to have ", expected,
                    " entries, got ", numbers);
}

inline void check_finite(const char* op, const char* arg, double value) {
  TORCH_CHECK_VALUE(std::isfinite(value), op, ": expected ", arg, " to be finite, got ", value);
}

inline void check_at_least(const char* op, const char* arg, int64_t value, int64_t lowest) {
  TORCH_CHECK_VALUE(value >= lowest, op, ": expected ", arg, " to be at least ", lowest, ", got ", value);
}

inline void check_at_most(const char* op, const char* arg, int64_t value, int64_t highest) {
  TORCH_CHECK_VALUE(value <= highest, op, ": expected ", arg, " to be at most ", highest, ", got ", value);
}

// A norm adds it to a variance.
inline void check_eps(const char* op, double eps) {
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0, op, ": expected eps to be finite and at least 0, got ", eps);
}

inline void check_probability(const char* op, const char* arg, double value) {
  TORCH_CHECK_VALUE(0 <= value && value <= 1, op, ": expected ", arg, " to be a probability in [0, 1], got ", value);
}

}  // namespace fastdense

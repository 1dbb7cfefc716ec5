// SPDX-License-Identifier: Apache-2.0
// Front half of the bicubic ops, shared by all devices: what the arguments mean, the checks, the allocation.
//
// Every spatial axis is multiplied by a banded matrix (bicubic_table.h); the backward ops multiply by its transpose,
// and the gradient of a backward op is the forward op again.  A result has the memory format of its input: channels
// innermost, or contiguous.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

#include "bicubic/bicubic_table.h"

namespace fastdense {

struct BicubicOptions {
  double a;
  bool antialias;
  std::string_view border;  // clamp, drop or symmetric
  bool align_corners;
  bool short_weights = false;  // see BicubicAxis
};

// How byte results are rounded: once in float32, halves to even (OpenCV); after each axis in double, halves up
// (MATLAB); or after each axis in fixed point (Pillow since version 13, Pillow until 12, torch with weights of 16
// bits).
enum class ByteRounding { kLast, kMatlab, kPillow, kPillow12, kTorch };

struct BicubicArgs {
  at::Tensor input;  // contiguous or channels innermost
  bool channels_last = false;
  std::vector<std::shared_ptr<const BicubicTable>> tables;  // one a spatial axis; nullptr where nothing changes
  std::vector<int64_t> sizes;                               // of the result
  bool columns_first = true;                                // of the last two axes: the cheaper order
  int64_t planes() const { return channels_last ? input.size(0) : input.size(0) * input.size(1); }
  int64_t inner() const { return channels_last ? input.size(1) : 1; }
  bool unchanged() const;  // every axis
  at::Tensor empty_result() const;
};

// `size`: of the result.  `transposed`: the input has the size of a forward result, `size` that of its input.
BicubicArgs parse_bicubic(const char* op, const at::Tensor& input, at::IntArrayRef size, at::ArrayRef<double> step,
                          const BicubicOptions& options, bool transposed);

// The residual in the result's memory format, or undefined.
at::Tensor bicubic_residual(const char* op, const std::optional<at::Tensor>& residual, const at::Tensor& input,
                            const at::Tensor& out);

ByteRounding check_bicubic_bytes(const at::Tensor& input, std::string_view rounding);

// Sums of fixed-point products must stay below 2^31.
void check_fixed_weights(const BicubicArgs& args);

// Whether float32 holds every sum of bytes times weights of 16 bits: where an axis does not shrink much.
bool is_exact_in_float(const BicubicArgs& args);

// Which axis a library that rounds in between takes first: torch the columns, Pillow mostly them, MATLAB the one with
// the smaller scale, rows where they are equal.
bool byte_columns_first(const BicubicArgs& args, ByteRounding rounding, at::ArrayRef<double> step);

// Fixed-point weights of kFixedBits, rounded halves away from zero.
inline int32_t fixed_weight(double w) { return int32_t(w * (1 << kFixedBits) + (w < 0 ? -0.5 : 0.5)); }

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
// The bicubic ops but for the arithmetic: checks, allocation, dispatch.  A device gives
//   Engine::resample<T, A>(args, residual, out, finish)
#pragma once

#include <ATen/Dispatch.h>

#include <cmath>

#include "bicubic/bicubic.h"
#include "core/checks.h"
#include "core/layout.h"
#include "core/storage.h"

namespace fastdense {

// How a result is finished: the order of two axes, rounding to bytes in between, limits, whether bytes made of float32
// round halves up, not to even, and whether the weights are short.
struct BicubicFinish {
  bool columns_first, round_between;
  double low, high;
  bool half_up = false, short_weights = false;
};

// What becomes of resampled values: a residual is added, the sum is clamped.
struct BicubicEpilogue {
  const std::optional<at::Tensor>& residual;
  double low, high;
};

template <typename Engine>
at::Tensor run_bicubic(const char* op, const at::Tensor& input, at::IntArrayRef size, at::ArrayRef<double> step,
                       const BicubicOptions& options, bool transposed, const BicubicEpilogue& epilogue) {
  check_floating(op, "input", input);
  TORCH_CHECK_VALUE(epilogue.low <= epilogue.high, op, ": expected low to be at most high, got ", epilogue.low, " and ",
                    epilogue.high);
  if (input.dim() == 5 && input.element_size() == 2) {  // what lies between the axes stays in float32
    const auto& residual = epilogue.residual;
    const auto added = residual ? std::optional(residual->to(at::kFloat)) : residual;
    return run_bicubic<Engine>(op, input.to(at::kFloat), size, step, options, transposed,
                               {added, epilogue.low, epilogue.high})
        .to(input.scalar_type());
  }
  const BicubicArgs args = parse_bicubic(op, input, size, step, options, transposed);
  at::Tensor out = args.empty_result();
  const at::Tensor added = bicubic_residual(op, epilogue.residual, input, out);
  if (!has_values(out)) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "bicubic", [&] {
    using T = typename Storage<scalar_t>::type;
    Engine::template resample<T, accumulate_t<T>>(args, added, out,
                                                  {args.columns_first, false, epilogue.low, epilogue.high});
  });
  return out;
}

template <typename Engine>
at::Tensor run_bicubic_uint8(const at::Tensor& input, at::IntArrayRef size, at::ArrayRef<double> step,
                             const BicubicOptions& options, std::string_view rounding) {
  const ByteRounding rounded = check_bicubic_bytes(input, rounding);
  BicubicOptions given = options;
  given.short_weights = rounded == ByteRounding::kTorch;
  const BicubicArgs args = parse_bicubic("bicubic_uint8", input, size, step, given, false);
  at::Tensor out = args.empty_result();
  if (!has_values(out)) return out;
  if (args.unchanged()) return out.copy_(input);
  const bool columns_first = byte_columns_first(args, rounded, step);
  if (rounded == ByteRounding::kLast) {
    Engine::template resample<uint8_t, float>(args, {}, out, {columns_first, false, 0, 255});
  } else if (rounded == ByteRounding::kMatlab) {
    Engine::template resample<uint8_t, double>(args, {}, out, {columns_first, true, 0, 255});
  } else {
    check_fixed_weights(args);
    if (rounded == ByteRounding::kTorch && Engine::sums_bytes_in_float(args))
      Engine::template resample<uint8_t, float>(args, {}, out, {columns_first, true, 0, 255, true});
    else
      Engine::template resample<uint8_t, int32_t>(args, {}, out,
                                                  {columns_first, true, 0, 255, false, given.short_weights});
  }
  return out;
}

}  // namespace fastdense

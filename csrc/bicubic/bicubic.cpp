// SPDX-License-Identifier: Apache-2.0
#include "bicubic/bicubic.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>

#include "core/checks.h"
#include "core/huge_pages.h"
#include "core/layout.h"

namespace fastdense {
namespace {

void check_arguments(const char* op, const at::Tensor& input, at::IntArrayRef size, at::ArrayRef<double> step, double a,
                     bool transposed) {
  check_rank_between(op, "input", input, 3, 5);
  const auto dims = size_t(input.dim() - 2);
  check_entries(op, "size", size.size(), int64_t(dims));
  check_entries(op, "step", step.size(), int64_t(dims));
  for (size_t d = 0; d < dims; ++d) {
    TORCH_CHECK_VALUE(size[d] > 0 && size[d] < INT32_MAX, op, ": expected size to be positive and below 2^31, got ",
                      size);
    TORCH_CHECK_VALUE(input.size(int64_t(d) + 2) > 0 && input.size(int64_t(d) + 2) < INT32_MAX, op,
                      ": expected input to have positive spatial sizes, got shape ", input.sizes());
    const int64_t given = input.size(int64_t(d) + 2), from = transposed ? size[d] : given,
                  to = transposed ? given : size[d];
    TORCH_CHECK_VALUE(0 <= step[d] && step[d] <= widest_step(from, to), op,
                      ": expected step to be at least 0 and at most ", widest_step(from, to), " to make ", to,
                      " samples of ", from, ", got ", step[d]);
  }
  check_finite(op, "a", a);
}

// The work of the last two axes when the columns are resampled first, and when the rows are.  Columns pick their
// samples one by one, rows are streamed: a term of theirs costs several times less.
bool columns_first_is_cheaper(const BicubicTable& rows, const BicubicTable& columns) {
  constexpr double kPick = 4;
  const double last = double(rows.rows) * double(columns.rows);
  const double columns_first =
      kPick * double(rows.columns) * double(columns.rows * columns.taps) + last * double(rows.taps);
  const double rows_first =
      double(rows.rows) * double(columns.columns * rows.taps) + kPick * last * double(columns.taps);
  return columns_first <= rows_first;
}

}  // namespace

at::Tensor bicubic_residual(const char* op, const std::optional<at::Tensor>& residual, const at::Tensor& input,
                            const at::Tensor& out) {
  if (!residual) return {};
  check_like(op, "residual", *residual, "input", input);
  check_shape(op, "residual", *residual, out.sizes());
  return residual->strides() == out.strides() ? *residual : at::empty_like(out).copy_(*residual);
}

ByteRounding check_bicubic_bytes(const at::Tensor& input, std::string_view rounding) {
  constexpr const char* kOp = "bicubic_uint8";
  check_dtype(kOp, "input", input, at::kByte);
  check_rank_between(kOp, "input", input, 3, 4);
  if (rounding == "last") return ByteRounding::kLast;
  if (rounding == "matlab") return ByteRounding::kMatlab;
  if (rounding == "pillow") return ByteRounding::kPillow;
  if (rounding == "pillow12") return ByteRounding::kPillow12;
  if (rounding == "torch") return ByteRounding::kTorch;
  TORCH_CHECK_VALUE(false, kOp, ": expected rounding to be last, matlab, pillow, pillow12 or torch, got ", rounding);
}

bool byte_columns_first(const BicubicArgs& args, ByteRounding rounding, at::ArrayRef<double> step) {
  const at::Tensor& in = args.input;
  if (rounding == ByteRounding::kLast) return args.columns_first;
  if (rounding == ByteRounding::kMatlab) return step.size() == 2 && step[1] > step[0];
  return rounding != ByteRounding::kPillow || step.size() != 2 ||
         !pillow_rows_first(in.size(2), in.size(3), args.sizes[2], args.sizes[3]);
}

void check_fixed_weights(const BicubicArgs& args) {
  for (const auto& table : args.tables)
    TORCH_CHECK_VALUE(!table || table->most <= 2,
                      "bicubic_uint8: expected a for which the absolute weights of a sample sum to at most 2, got ",
                      table->most);
}

bool is_exact_in_float(const BicubicArgs& args) {
  return std::all_of(args.tables.begin(), args.tables.end(), [](const auto& table) {
    return !table || std::ldexp(255 * table->most, table->bits) < (1 << 24);
  });
}

bool BicubicArgs::unchanged() const {
  return std::none_of(tables.begin(), tables.end(), [](const auto& table) { return bool(table); });
}

at::Tensor BicubicArgs::empty_result() const {
  return with_huge_pages(channels_last ? empty_channels_last(sizes, input.options())
                                       : at::empty(sizes, input.options()));
}

BicubicArgs parse_bicubic(const char* op, const at::Tensor& input, at::IntArrayRef size, at::ArrayRef<double> step,
                          const BicubicOptions& options, bool transposed) {
  check_arguments(op, input, size, step, options.a, transposed);
  const std::optional<Border> border = find_border(options.border);
  TORCH_CHECK_VALUE(border, op, ": expected border to be clamp, drop or symmetric, got ", options.border);
  BicubicArgs args;
  args.channels_last = is_channels_last(input);
  args.input = args.channels_last ? input : input.contiguous();
  args.sizes = input.sizes().slice(0, 2).vec();
  args.sizes.insert(args.sizes.end(), size.begin(), size.end());
  if (input.is_meta()) return args;
  for (size_t d = 0; d < size.size(); ++d) {
    const int64_t from = input.size(int64_t(d) + 2);
    const auto table =
        bicubic_table({transposed ? size[d] : from, transposed ? from : size[d], step[d], options.a, options.antialias,
                       *border, options.align_corners, transposed, options.short_weights});
    args.tables.push_back(table->identity ? nullptr : table);
  }
  if (const size_t dims = size.size(); dims >= 2 && args.tables[dims - 2] && args.tables[dims - 1])
    args.columns_first = columns_first_is_cheaper(*args.tables[dims - 2], *args.tables[dims - 1]);
  return args;
}

}  // namespace fastdense

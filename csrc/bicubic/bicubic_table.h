// SPDX-License-Identifier: Apache-2.0
// Banded matrices of resampled axes, made on the host in double and kept in a bounded cache.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "bicubic/bicubic_math.h"

namespace fastdense {

// One axis, from `in` to `out` samples; `step` = input samples an output sample.
struct BicubicAxis {
  int64_t in, out;
  double step;
  double a;
  bool antialias;
  Border border;
  bool align_corners;
  bool transposed;     // the transposed matrix: from `out` to `in` samples, for gradients
  bool short_weights;  // rounded to integers of 16 bits times a power of two, as torch does for bytes
};

// A matrix [rows, columns] with at most `taps` neighbouring entries a row: row r has weight[r * taps + i] in column
// start[r] + i.  Starts never fall, and start + taps <= columns.
struct BicubicTable {
  int64_t rows = 0, columns = 0, taps = 0;
  std::vector<int32_t> start;
  std::vector<double> weight;
  bool identity = false;
  double most = 0;  // sum of the absolute weights of a row, at most
  int bits = 0;     // of short weights: they are integers times 2^-bits
};

// By its name: clamp, drop or symmetric.
inline std::optional<Border> find_border(std::string_view name) {
  if (name == "clamp") return Border::kClamp;
  if (name == "drop") return Border::kDrop;
  if (name == "symmetric") return Border::kSymmetric;
  return std::nullopt;
}

// The widest step from sample to sample: beyond the image only the border is left to weigh, tap by tap.
inline double widest_step(int64_t in, int64_t out) { return (4.0 * double(in) + double(1 << 26)) / double(out); }

// Of an axis whose step is at most that.
BicubicTable make_bicubic_table(const BicubicAxis& axis);

// From the cache, which holds a limited number of tables; safe from any thread.
std::shared_ptr<const BicubicTable> bicubic_table(const BicubicAxis& axis);

}  // namespace fastdense

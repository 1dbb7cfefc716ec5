// SPDX-License-Identifier: Apache-2.0
// The merge of a dual path block (Chen et al., "Dual Path Networks", 2017, equations 5 to 8) and its adjoint, the
// split: functors over the elements of the widest tensor, shared by every device.
//
// A row is [R residual | D dense | K new] channels, times what lies behind the channels in memory:
//
//   input [rows, R + D], features [rows, R + K]  ->  output [rows, R + D + K] = [input + features | input | features]
//   split: grad [rows, R + D + K]  ->  [rows, R + D] = [grad | grad],  [rows, R + K] = [grad | grad behind the dense]
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/scalar.h"

namespace fastdense {

enum class PathSegment { kResidual, kDense, kNew };

struct PathWidths {
  int64_t residual, dense, fresh;  // elements of a row
  FASTDENSE_HD int64_t input() const { return residual + dense; }
  FASTDENSE_HD int64_t features() const { return residual + fresh; }
  FASTDENSE_HD int64_t output() const { return residual + dense + fresh; }
};

template <typename T>
struct DualPathMerge {
  const T* input;
  const T* features;
  T* output;
  PathWidths widths;

  template <PathSegment kSegment>
  FASTDENSE_HD void element(int64_t row, int64_t column) const {
    const int64_t from = row * widths.input() + column, to = row * widths.output() + column;
    const int64_t feature = row * widths.features() + column;
    if constexpr (kSegment == PathSegment::kResidual) {
      output[to] = store<T>(load(input[from]) + load(features[feature]));
    } else if constexpr (kSegment == PathSegment::kDense) {
      output[to] = input[from];
    } else {
      output[to] = features[feature - widths.dense];
    }
  }
};

template <typename T>
struct DualPathSplit {
  const T* grad;
  T* grad_input;
  T* grad_features;
  PathWidths widths;

  template <PathSegment kSegment>
  FASTDENSE_HD void element(int64_t row, int64_t column) const {
    const int64_t from = row * widths.output() + column, to = row * widths.input() + column;
    const int64_t feature = row * widths.features() + column;
    if constexpr (kSegment != PathSegment::kNew) grad_input[to] = grad[from];
    if constexpr (kSegment == PathSegment::kResidual) grad_features[feature] = grad[from];
    if constexpr (kSegment == PathSegment::kNew) grad_features[feature - widths.dense] = grad[from];
  }
};

// functor.element() for one element of the widest tensor.
template <typename Functor>
struct PathElement {
  Functor functor;
  FASTDENSE_HD void operator()(int64_t i) const {
    const int64_t row = i / functor.widths.output(), column = i - row * functor.widths.output();
    if (column < functor.widths.residual)
      functor.template element<PathSegment::kResidual>(row, column);
    else if (column < functor.widths.input())
      functor.template element<PathSegment::kDense>(row, column);
    else
      functor.template element<PathSegment::kNew>(row, column);
  }
};

// The same for all elements in [begin, end): a loop without branches for each segment of a row.
template <typename Functor>
inline void for_each_path_element(const Functor& f, int64_t begin, int64_t end) {
  const int64_t width = f.widths.output(), residual = f.widths.residual, input = f.widths.input();
  for (int64_t row = begin / width; row * width < end; ++row) {
    const int64_t first = std::max<int64_t>(begin - row * width, 0), last = std::min(end - row * width, width);
    for (int64_t j = first; j < std::min(last, residual); ++j) f.template element<PathSegment::kResidual>(row, j);
    for (int64_t j = std::max(first, residual); j < std::min(last, input); ++j)
      f.template element<PathSegment::kDense>(row, j);
    for (int64_t j = std::max(first, input); j < last; ++j) f.template element<PathSegment::kNew>(row, j);
  }
}

}  // namespace fastdense

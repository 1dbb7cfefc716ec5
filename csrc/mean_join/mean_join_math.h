// SPDX-License-Identifier: Apache-2.0
// The join of a fractal: the mean of m tensors, element by element, with equal weights,
//
//   y[i] = (x_1[i] + x_2[i] + ... + x_m[i]) / m
//
// added up in this order and divided once, in the accumulation type. The gradient of every input is dy / m.
// Larsson, Maire, Shakhnarovich: FractalNet. arXiv:1605.07648 (2016), section 2.
#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace fastdense {

// Limits what a kernel takes by value; a fractal of C columns joins at most C.
constexpr int kMaxJoined = 16;

template <typename T>
struct MeanJoin {
  using A = accumulate_t<T>;

  const T* inputs[kMaxJoined];  // of which the first `joined` count
  T* output;
  int joined;

  FASTDENSE_HD A first(int64_t i) const { return load(inputs[0][i]); }
  FASTDENSE_HD A plus(A sum, int input, int64_t i) const { return sum + load(inputs[input][i]); }
  FASTDENSE_HD void finish(A sum, int64_t i) const { output[i] = store<T>(sum / A(joined)); }

  // One element; the CPU loops call the steps for a tile of elements each.
  FASTDENSE_HD void operator()(int64_t i) const {
    A sum = first(i);
    for (int input = 1; input < joined; ++input) sum = plus(sum, input, i);
    finish(sum, i);
  }
};

}  // namespace fastdense

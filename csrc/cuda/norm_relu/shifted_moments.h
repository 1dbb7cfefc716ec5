// SPDX-License-Identifier: Apache-2.0
// Moments of V neighbouring columns relative to their first row; included by .cu files only.
#pragma once

#include "cuda/norm_relu/column_reduce.h"

namespace fastdense {

template <typename T, int V>
class ShiftedMoments {
  using A = accumulate_t<T>;

 public:
  __device__ explicit ShiftedMoments(const Vector<T, V>& pivot) {
#pragma unroll
    for (int i = 0; i < V; ++i) pivot_[i] = load(pivot.v[i]);
  }
  template <int kRows>
  __device__ void add_rows(const Vector<T, V> (&x)[kRows]) {
    A shifted[kRows][V];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < V; ++i) shifted[r][i] = load(x[r].v[i]) - pivot_[i];
    state_.add_rows(shifted);
  }
  __device__ ColumnMoments<A, V>& state() { return state_; }

 private:
  A pivot_[V];
  ColumnMoments<A, V> state_;
};

}  // namespace fastdense

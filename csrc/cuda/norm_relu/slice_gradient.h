// SPDX-License-Identifier: Apache-2.0
// The gradient of a slice with its corrections, for norms of the batch and of samples; included by .cu files only.
#pragma once

#include "cuda/norm_relu/columns.h"

namespace fastdense {

// d = dropout factor * corrected gradient.  P has gradient, x, d and dropout; `mean` and the sums are those of the
// rows.
template <typename T, int V, typename P>
class SliceGradientColumns : public Columns<P, V> {
  using A = accumulate_t<T>;
  using Base = Columns<P, V>;
  using Base::p_, Base::first_;

 public:
  static constexpr int kTileRows = 2;
  using State = NoState;

  template <int kRows>
  __device__ void tile(int64_t row, int64_t step) {
    Vector<T, V> g[kRows], x[kRows];
    this->read_rows(p_.gradient, row, step, g);
    this->read_rows(p_.x, row, step, x);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < V; ++i)
        g[r].v[i] =
            store<T>(finalise_gradient<A>(load(g[r].v[i]), load(x[r].v[i]), mean_[i], shift_sum_[i], slope_sum_[i]));
      apply_dropout(p_.dropout, (row + r * step) * p_.d.ld + first_, g[r]);
      this->write_row(p_.d, row + r * step, g[r]);
    }
  }

 protected:
  __device__ SliceGradientColumns(const P& p, int64_t first, int count, const A* mean, const double* shift_sum,
                                  const double* slope_sum)
      : Base(p, first, count),
        mean_(mean, first, count),
        shift_sum_(shift_sum, first, count),
        slope_sum_(slope_sum, first, count) {}

 private:
  const ColumnValues<A, V> mean_, shift_sum_, slope_sum_;
};

}  // namespace fastdense

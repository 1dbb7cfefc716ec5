// SPDX-License-Identifier: Apache-2.0
// What the forward and backward kernels of cuda/norm_relu/norm_relu_launch.h share on the device; included by .cu files
// only.
#pragma once

#include <type_traits>

#include "cuda/norm_relu/column_reduce.h"
#include "cuda/norm_relu/norm_relu_launch.h"

namespace fastdense {

// Base of the reductions: the parameters, and V neighbouring columns of matrices, of which `count_` exist.
template <typename P, int V>
class Columns {
 public:
  using Params = P;

 protected:
  __device__ Columns(const Params& p, int64_t first, int count) : p_(p), first_(first), count_(count) {}

  template <typename T>
  __device__ Vector<std::remove_const_t<T>, V> read_row(const Matrix<T>& m, int64_t row) const {
    return read<V>(m.data + row * m.ld + first_, count_);
  }
  template <typename T, typename Rows>
  __device__ void read_rows(const Matrix<T>& m, int64_t row, int64_t step, Rows& x) const {
#pragma unroll
    for (int r = 0; r < int(std::extent_v<Rows>); ++r) x[r] = read_row(m, row + r * step);
  }
  template <typename T>
  __device__ void write_row(const Matrix<T>& m, int64_t row, const Vector<T, V>& x) const {
    write(m.data + row * m.ld + first_, x, count_);
  }

  const Params& p_;
  const int64_t first_;
  const int count_;
};

// scale and shift of V neighbouring channels.
template <typename A, int V>
struct ColumnScales {
  A scale[V], shift[V];
  __device__ ColumnScales(const NormParams<A>& norm, int64_t first, int count) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      scale[i] = shift[i] = A(0);
      if (i < count) {
        const NormCoefficients<A> c = norm(first + i);
        scale[i] = c.scale;
        shift[i] = c.shift;
      }
    }
  }
};

// V neighbouring numbers of a vector, zeros beyond its end.
template <typename A, int V>
struct ColumnValues {
  A v[V];
  template <typename From>
  __device__ ColumnValues(const From* from, int64_t first, int count) {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = i < count ? A(from[first + i]) : A(0);
  }
  __device__ A operator[](int i) const { return v[i]; }
};

template <typename T>
uintptr_t address_bits(const Matrix<T>& m) {
  return address_bits(m.data, m.ld);
}

// Multiplies elements index, index + 1, ... of a layer's new features by their dropout factors.
template <typename T, int V>
__device__ __forceinline__ void apply_dropout(const DropoutParams& p, int64_t index, Vector<T, V>& x) {
  using A = accumulate_t<T>;
  if (!p.seed) return;
  const A factor = A(p.factor);
  PhiloxBlock random;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const uint64_t at = uint64_t(index) + i;
    if (i == 0 || at % 4 == 0) random = dropout_words(uint64_t(*p.seed), p.layer, at / 4);
    // Selects: an index that is known only at run time would send the words to memory.
    const uint32_t low = at & 1 ? random.words[1] : random.words[0];
    const uint32_t high = at & 1 ? random.words[3] : random.words[2];
    x.v[i] = (at & 2 ? high : low) >= p.threshold ? store<T>(load(x.v[i]) * factor) : store<T>(A(0));
  }
}

// The storage types; a build for tests may ask for fewer.
#ifndef FASTDENSE_FOR_EACH_STORAGE
#define FASTDENSE_FOR_EACH_STORAGE(X) X(float) X(double) X(bfloat16) X(half)
#endif

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
// Small matrix products on cache-sized chunks, single-threaded: the caller owns the loop over chunks and threads.
//
// Gemm<T> multiplies for a storage type T.  `Operand` is the type in which factors are held, results are always
// accumulate_t<T>.  The left factor is row-major with a depth padded by zeros to a multiple of kAlign; the right factor
// is in panels of kPanel columns, zero beyond the last column and beyond the depth.  Results have whole panels of
// columns, and rows up to a multiple of kAlign may be overwritten.
#pragma once

#include "cpu/simd/transpose.h"

namespace fastdense::FASTDENSE_TARGET {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A row-major matrix whose rows are `ld` elements apart.
template <typename V>
struct RowMajor {
  V* data;
  int64_t ld;
  operator RowMajor<const V>() const
    requires(!std::is_const_v<V>)
  {
    return {data, ld};
  }
  RowMajor from(int64_t row, int64_t column) const { return {data + row * ld + column, ld}; }
};

// Here factors are of the type of arithmetic, panels are [depth][kPanel], and the inner loop is two vector loads,
// kTileRows broadcasts and 2 * kTileRows fused multiply-adds.
template <typename T>
struct Gemm {
  using A = accumulate_t<T>;
  using Operand = A;
  using V = Vec<A>;
  static constexpr int64_t kPanel = 2 * V::kLanes;
  static constexpr int64_t kAlign = 1;
  static constexpr int64_t kLine = 64 / int64_t(sizeof(A));  // of the cache
  // Depth worked on at once: kGemmBlock x kPanel values of a panel stay in L1 while the rows of the chunk pass by.
  static constexpr int64_t kGemmBlock = 256;
  // Columns of the left factor of multiply_transposed that stay in L2 while the panels pass by; a multiple of
  // kTileRows.
  static constexpr int64_t kTransposedBlock = 192;

  // panel[r, i] = value(r, i) for i < columns.
  template <typename Value>
  static void fill_panel(int64_t depth, int64_t columns, const Value& value, Operand* panel) {
    for (int64_t r = 0; r < depth; ++r) {
      A* __restrict out = panel + r * kPanel;
      if (columns >= kPanel)
        for (int64_t i = 0; i < kPanel; ++i) out[i] = value(r, i);
      else
        for (int64_t i = 0; i < kPanel; ++i) out[i] = i < columns ? value(r, i) : A(0);
    }
  }

  // panel[r, i] = w[i * ld + r] for i < columns: rows of a weight [columns, depth] become columns.
  static void transpose_panel(const A* w, int64_t ld, int64_t depth, int64_t columns, Operand* panel) {
    const int64_t n = columns < kPanel ? columns : kPanel;
    transpose_matrix(w, ld, n, depth, panel, kPanel);
    for (int64_t r = 0; n < kPanel && r < depth; ++r)
      for (int64_t i = n; i < kPanel; ++i) panel[r * kPanel + i] = A(0);
  }

  // C[rows, n] = L[rows, depth] * B[depth, n], or += with `accumulate`
  static void multiply(int64_t rows, int64_t depth, int64_t n, RowMajor<const Operand> left, const Operand* panels,
                       RowMajor<A> c, bool accumulate = false) {
    for (int64_t k = 0; k < depth; k += kGemmBlock) {
      const int64_t block = depth - k < kGemmBlock ? depth - k : kGemmBlock;
      for (int64_t j = 0; j < n; j += kPanel) {
        // The next panel, the next block of the first one, or what lies behind them all.
        const int64_t at = j * depth + k * kPanel;
        const int64_t next = j + kPanel < n      ? at + depth * kPanel
                             : k + block < depth ? (k + block) * kPanel
                                                 : at + block * kPanel;
        column(rows, block, {left.data + k, left.ld, 1}, panels + at, c.from(0, j), accumulate || k > 0, next - at);
      }
    }
  }

  // Elements of workspace that transpose() needs.
  static constexpr int64_t transposed_size(int64_t, int64_t) { return 0; }

  // A left factor of multiply_transposed, prepared once for all its columns.  Here it is as it was.
  struct Transposed {
    const Operand* data;
    int64_t ld;
    Transposed from(int64_t row) const { return {data + row * ld, ld}; }
  };
  static Transposed transpose(int64_t, int64_t, RowMajor<const Operand> left, Operand*) { return {left.data, left.ld}; }

  // C[m, n] += L[rows, m]^T * R[rows, n]
  static void multiply_transposed(int64_t rows, int64_t m, int64_t n, const Transposed& left, const Operand* panels,
                                  RowMajor<A> c) {
    for (int64_t i = 0; i < m; i += kTransposedBlock)
      for (int64_t j = 0; j < n; j += kPanel)
        column(m - i < kTransposedBlock ? m - i : kTransposedBlock, rows, {left.data + i, 1, left.ld},
               panels + j * rows, c.from(i, j), true, 0);
  }

 private:
  // L(i, k) = data[i * row_stride + k * step]
  struct Left {
    const A* data;
    int64_t row_stride, step;
  };

  // C[Rows, kPanel] (+)= sum_k L(i, k) * panel[k, :].  kFetch: what lies `next` numbers behind the panel goes into
  // cache meanwhile.
  template <int Rows, bool kFetch = false>
  static void tile(int64_t depth, Left left, const A* panel, RowMajor<A> c, bool accumulate, int64_t next = 0) {
    V sum[Rows][2];
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      sum[i][0] = V::splat(0);
      sum[i][1] = V::splat(0);
    }
    for (int64_t k = 0; k < depth; ++k) {
      const V p0 = V::load(panel + k * kPanel), p1 = V::load(panel + k * kPanel + V::kLanes);
      if constexpr (kFetch)
        for (int64_t line = 0; line < kPanel; line += kLine) __builtin_prefetch(panel + k * kPanel + next + line);
#pragma GCC unroll 12
      for (int i = 0; i < Rows; ++i) {
        const V l = V::splat(left.data[i * left.row_stride + k * left.step]);
        sum[i][0] = V::fma(l, p0, sum[i][0]);
        sum[i][1] = V::fma(l, p1, sum[i][1]);
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      A* to = c.data + i * c.ld;
      // Last, not first: what many chunks have added up is then rounded once a chunk, not once a term.
      if (accumulate) {
        sum[i][0] = V::fma(V::splat(1), V::load(to), sum[i][0]);
        sum[i][1] = V::fma(V::splat(1), V::load(to + V::kLanes), sum[i][1]);
      }
      sum[i][0].store(to);
      sum[i][1].store(to + V::kLanes);
    }
  }

  // The last, short tile of a column of tiles.
  template <int Rows>
  static void short_tile(int64_t rows, int64_t depth, Left left, const A* panel, RowMajor<A> c, bool accumulate,
                         int64_t next) {
    if constexpr (Rows > 0) {
      if (rows != Rows) return short_tile<Rows - 1>(rows, depth, left, panel, c, accumulate, next);
      next != 0 ? tile<Rows, true>(depth, left, panel, c, accumulate, next)
                : tile<Rows>(depth, left, panel, c, accumulate);
    }
  }

  // The first tile waits for the panel to come from memory, unless the one before has fetched it, `next` numbers
  // behind; with few rows that is most of the time.
  static void column(int64_t rows, int64_t depth, Left left, const A* panel, RowMajor<A> c, bool accumulate,
                     int64_t next) {
    const auto from = [&](int64_t row) { return Left{left.data + row * left.row_stride, left.row_stride, left.step}; };
    int64_t i = 0;
    if (next != 0 && rows >= kTileRows) {
      tile<kTileRows, true>(depth, left, panel, c, accumulate, next);
      next = 0;
      i = kTileRows;
    }
    for (; i + kTileRows <= rows; i += kTileRows) tile<kTileRows>(depth, from(i), panel, c.from(i, 0), accumulate);
    short_tile<kTileRows - 1>(rows - i, depth, from(i), panel, c.from(i, 0), accumulate, next);
  }
};

}  // namespace fastdense::FASTDENSE_TARGET

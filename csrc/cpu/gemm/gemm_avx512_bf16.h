// SPDX-License-Identifier: Apache-2.0
// Gemm<bfloat16> on the dot products of AVX512-BF16 (see gemm.h): factors are rounded to bfloat16, sums are float32.
// The inner loop is two vector loads, kTileRows broadcasts of a pair and 2 * kTileRows dot products of pairs.
#pragma once

namespace fastdense::FASTDENSE_TARGET {

template <>
struct Gemm<bfloat16> : PairFactors {
  static void multiply(int64_t rows, int64_t depth, int64_t n, RowMajor<const Operand> left, const Operand* panels,
                       RowMajor<A> c, bool accumulate = false) {
    for (int64_t k = 0; k < depth; k += kGemmBlock) {
      const int64_t block = depth - k < kGemmBlock ? depth - k : kGemmBlock;
      for (int64_t j = 0; j < n; j += kPanel)
        column(rows, block, left.from(0, k), panels + j * round_up(depth, kAlign) + k * kPanel, c.from(0, j),
               accumulate || k > 0);
    }
  }

  static void multiply_transposed(int64_t rows, int64_t m, int64_t n, const Transposed& left, const Operand* panels,
                                  RowMajor<A> c) {
    multiply(m, rows, n, {left.data, left.ld}, panels, c, true);
  }

 private:
  static constexpr int64_t kGemmBlock = 512;  // as deep a part of a panel stays in L1 while the rows pass by

  // C[Rows, kPanel] (+)= left * panel, pair by pair of the depth.
  template <int Rows>
  static void tile(int64_t pairs, RowMajor<const Operand> left, const Operand* panel, RowMajor<A> c, bool accumulate) {
    const auto pair = [](const Operand* at) {
      int32_t word;
      __builtin_memcpy(&word, at, sizeof(word));
      return (__m512bh)_mm512_set1_epi32(word);
    };
    const auto vector = [](const Operand* at) { return (__m512bh)_mm512_loadu_si512(at); };
    __m512 sum[Rows][2];
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; ++k) {
      const __m512bh p0 = vector(panel + 2 * k * kPanel), p1 = vector(panel + 2 * k * kPanel + kPanel);
#pragma GCC unroll 12
      for (int i = 0; i < Rows; ++i) {
        const __m512bh l = pair(left.data + i * left.ld + 2 * k);
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], l, p0);
        sum[i][1] = _mm512_dpbf16_ps(sum[i][1], l, p1);
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      A* to = c.data + i * c.ld;
      if (accumulate) {
        sum[i][0] = _mm512_add_ps(sum[i][0], _mm512_loadu_ps(to));
        sum[i][1] = _mm512_add_ps(sum[i][1], _mm512_loadu_ps(to + 16));
      }
      _mm512_storeu_ps(to, sum[i][0]);
      _mm512_storeu_ps(to + 16, sum[i][1]);
    }
  }

  // The last, short tile of a column of tiles.
  template <int Rows>
  static void short_tile(int64_t rows, int64_t pairs, RowMajor<const Operand> left, const Operand* panel, RowMajor<A> c,
                         bool accumulate) {
    if constexpr (Rows > 0) {
      if (rows == Rows) return tile<Rows>(pairs, left, panel, c, accumulate);
      short_tile<Rows - 1>(rows, pairs, left, panel, c, accumulate);
    }
  }

  static void column(int64_t rows, int64_t depth, RowMajor<const Operand> left, const Operand* panel, RowMajor<A> c,
                     bool accumulate) {
    const int64_t pairs = (depth + 1) / 2;
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows)
      tile<kTileRows>(pairs, left.from(i, 0), panel, c.from(i, 0), accumulate);
    short_tile<kTileRows - 1>(rows - i, pairs, left.from(i, 0), panel, c.from(i, 0), accumulate);
  }
};

}  // namespace fastdense::FASTDENSE_TARGET

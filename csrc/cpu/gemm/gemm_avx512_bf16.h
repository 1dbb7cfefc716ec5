// SPDX-License-Identifier: Apache-2.0
// Gemm<bfloat16> on the dot products of AVX512-BF16 (see gemm.h): factors are rounded to bfloat16, sums are float32.
// The inner loop is two vector loads, kTileRows broadcasts of a pair and 2 * kTileRows dot products of pairs.
#pragma once

namespace fastdense::FASTDENSE_TARGET {

template <>
struct Gemm<bfloat16> : PairFactors {
  static void multiply(int64_t rows, int64_t depth, int64_t n, const Operand* left, int64_t ldl, const Operand* panels,
                       A* c, int64_t ldc, bool accumulate = false) {
    for (int64_t k = 0; k < depth; k += kGemmBlock) {
      const int64_t block = depth - k < kGemmBlock ? depth - k : kGemmBlock;
      for (int64_t j = 0; j < n; j += kPanel)
        column(rows, block, left + k, ldl, panels + j * round_up(depth, kAlign) + k * kPanel, c + j, ldc,
               accumulate || k > 0);
    }
  }

  static void multiply_transposed(int64_t rows, int64_t m, int64_t n, const Transposed& left, const Operand* panels,
                                  A* c, int64_t ldc) {
    multiply(m, rows, n, left.data, left.ld, panels, c, ldc, true);
  }

 private:
  static constexpr int64_t kGemmBlock = 512;  // as deep a part of a panel stays in L1 while the rows pass by

  // C[Rows, kPanel] (+)= left * panel, pair by pair of the depth.
  template <int Rows>
  static void tile(int64_t pairs, const Operand* left, int64_t ldl, const Operand* panel, A* c, int64_t ldc,
                   bool accumulate) {
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
        const __m512bh l = pair(left + i * ldl + 2 * k);
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], l, p0);
        sum[i][1] = _mm512_dpbf16_ps(sum[i][1], l, p1);
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      if (accumulate) {
        sum[i][0] = _mm512_add_ps(sum[i][0], _mm512_loadu_ps(c + i * ldc));
        sum[i][1] = _mm512_add_ps(sum[i][1], _mm512_loadu_ps(c + i * ldc + 16));
      }
      _mm512_storeu_ps(c + i * ldc, sum[i][0]);
      _mm512_storeu_ps(c + i * ldc + 16, sum[i][1]);
    }
  }

  // The last, short tile of a column of tiles.
  template <int Rows>
  static void short_tile(int64_t rows, int64_t pairs, const Operand* left, int64_t ldl, const Operand* panel, A* c,
                         int64_t ldc, bool accumulate) {
    if constexpr (Rows > 0) {
      if (rows == Rows) return tile<Rows>(pairs, left, ldl, panel, c, ldc, accumulate);
      short_tile<Rows - 1>(rows, pairs, left, ldl, panel, c, ldc, accumulate);
    }
  }

  static void column(int64_t rows, int64_t depth, const Operand* left, int64_t ldl, const Operand* panel, A* c,
                     int64_t ldc, bool accumulate) {
    const int64_t pairs = (depth + 1) / 2;
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows)
      tile<kTileRows>(pairs, left + i * ldl, ldl, panel, c + i * ldc, ldc, accumulate);
    short_tile<kTileRows - 1>(rows - i, pairs, left + i * ldl, ldl, panel, c + i * ldc, ldc, accumulate);
  }
};

}  // namespace fastdense::FASTDENSE_TARGET

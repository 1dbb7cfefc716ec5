// SPDX-License-Identifier: Apache-2.0
// Factors of Gemm<bfloat16> (see gemm.h) for instructions that multiply pairs of bfloat16 and add up in float32.  The
// right factor keeps pairs of the depth together: panels are [depth / 2][kPanel][2].
#pragma once

namespace fastdense::FASTDENSE_TARGET {

struct PairFactors {
  using A = float;
  using Operand = bfloat16;
  static constexpr int64_t kPanel = 32;
  static constexpr int64_t kAlign = 32;

  template <typename Value>
  static void fill_panel(int64_t depth, int64_t columns, const Value& value, Operand* panel) {
    auto* pairs = reinterpret_cast<uint32_t*>(panel);
    const auto bits = [&](int64_t r, int64_t i) { return uint32_t(to_bits(store<bfloat16>(value(r, i)))); };
    for (int64_t r = 0; r < depth; r += 2) {
      uint32_t* __restrict out = pairs + r / 2 * kPanel;
      if (columns >= kPanel && r + 1 < depth)
        for (int64_t i = 0; i < kPanel; ++i) out[i] = bits(r, i) | bits(r + 1, i) << 16;
      else
        for (int64_t i = 0; i < kPanel; ++i)
          out[i] = i >= columns ? 0 : bits(r, i) | (r + 1 < depth ? bits(r + 1, i) << 16 : 0);
    }
    for (int64_t i = (depth + 1) / 2 * kPanel; i < round_up(depth, kAlign) / 2 * kPanel; ++i) pairs[i] = 0;
  }

  static constexpr int64_t transposed_size(int64_t rows, int64_t m) {
    return round_up(m, kAlign) * transposed_ld(rows);
  }

  // left[rows, m] as [m, transposed_ld(rows)], zero beyond the last row.
  struct Transposed {
    const Operand* data;
    int64_t ld;
    Transposed from(int64_t row) const { return {data + row, ld}; }
  };
  static Transposed transpose(int64_t rows, int64_t m, RowMajor<const Operand> left, Operand* out) {
    const int64_t ld = transposed_ld(rows);
    for (int64_t r = 0; r < rows; r += 32)
      for (int64_t j = 0; j < m; j += 16)
        transpose_block(rows - r < 32 ? rows - r : 32, left.from(r, j), {out + j * ld + r, ld});
    return {out, ld};
  }

 private:
  // Off the power of two, so that rows do not fall into the same cache set.
  static constexpr int64_t transposed_ld(int64_t rows) { return round_up(rows, kAlign) + kAlign; }

  // [32, 16] to [16, 32]; rows from `rows` on are taken as zero.  Pairs of rows become one 32-bit number a column, and
  // the 16 x 16 matrix of these is transposed in registers.
  static void transpose_block(int64_t rows, RowMajor<const Operand> in, RowMajor<Operand> out) {
    const auto row = [&](int64_t r) {
      return r < rows ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in.data + r * in.ld)))
                      : _mm512_setzero_si512();
    };
    __m512i v[16], w[16];
#pragma GCC unroll 16
    for (int64_t p = 0; p < 16; ++p) v[p] = _mm512_or_si512(row(2 * p), _mm512_slli_epi32(row(2 * p + 1), 16));
#pragma GCC unroll 8
    for (int p = 0; p < 16; p += 2) {
      w[p] = _mm512_unpacklo_epi32(v[p], v[p + 1]);
      w[p + 1] = _mm512_unpackhi_epi32(v[p], v[p + 1]);
    }
#pragma GCC unroll 4
    for (int p = 0; p < 16; p += 4) {  // v[p + q]: columns q, q + 4, q + 8, q + 12 of rows p ... p + 3
      v[p] = _mm512_unpacklo_epi64(w[p], w[p + 2]);
      v[p + 1] = _mm512_unpackhi_epi64(w[p], w[p + 2]);
      v[p + 2] = _mm512_unpacklo_epi64(w[p + 1], w[p + 3]);
      v[p + 3] = _mm512_unpackhi_epi64(w[p + 1], w[p + 3]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const __m512i a = _mm512_shuffle_i32x4(v[q], v[q + 4], 0x44), b = _mm512_shuffle_i32x4(v[q], v[q + 4], 0xee);
      const __m512i c = _mm512_shuffle_i32x4(v[q + 8], v[q + 12], 0x44);
      const __m512i d = _mm512_shuffle_i32x4(v[q + 8], v[q + 12], 0xee);
      _mm512_storeu_si512(out.data + q * out.ld, _mm512_shuffle_i32x4(a, c, 0x88));
      _mm512_storeu_si512(out.data + (q + 4) * out.ld, _mm512_shuffle_i32x4(a, c, 0xdd));
      _mm512_storeu_si512(out.data + (q + 8) * out.ld, _mm512_shuffle_i32x4(b, d, 0x88));
      _mm512_storeu_si512(out.data + (q + 12) * out.ld, _mm512_shuffle_i32x4(b, d, 0xdd));
    }
  }
};

}  // namespace fastdense::FASTDENSE_TARGET

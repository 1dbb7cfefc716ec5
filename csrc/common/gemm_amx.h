// SPDX-License-Identifier: Apache-2.0
// Gemm<bfloat16> on the tile registers of AMX-BF16 (see gemm.h): factors are rounded to bfloat16, sums are float32.
// A tile is 16 rows of 64 bytes; one instruction adds [16 rows, 32 deep] * [32 deep, 16 columns].  The right factor
// keeps pairs of the depth together: panels are [depth / 2][kPanel][2].

namespace fastdense::FASTDENSE_TARGET {

// Sets all eight tiles to 16 x 64 bytes while it lives; other users of the tiles set them up for themselves.
class TileScope {
 public:
  TileScope() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
};

template <>
struct Gemm<bfloat16> {
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

  static void multiply(int64_t rows, int64_t depth, int64_t n, const Operand* left, int64_t ldl, const Operand* panels,
                       A* c, int64_t ldc, bool accumulate = false) {
    const TileScope scope;
    const int64_t deep = round_up(depth, kAlign);
    for (int64_t j = 0; j < n; j += kPanel)
      for (int64_t i = 0; i < rows; i += 32)
        block(rows - i > 16, deep, left + i * ldl, ldl, panels + j * deep, c + i * ldc + j, ldc, accumulate);
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
  static Transposed transpose(int64_t rows, int64_t m, const Operand* left, int64_t ldl, Operand* out) {
    const int64_t ld = transposed_ld(rows);
    for (int64_t r = 0; r < rows; r += 32)
      for (int64_t j = 0; j < m; j += 16)
        transpose_block(rows - r < 32 ? rows - r : 32, left + r * ldl + j, ldl, out + j * ld + r, ld);
    return {out, ld};
  }

  static void multiply_transposed(int64_t rows, int64_t m, int64_t n, const Transposed& left, const Operand* panels,
                                  A* c, int64_t ldc) {
    const TileScope scope;
    const int64_t deep = round_up(rows, kAlign);
    for (int64_t j = 0; j < n; j += kPanel)
      for (int64_t i = 0; i < m; i += 32)
        block(m - i > 16, deep, left.data + i * left.ld, left.ld, panels + j * deep, c + i * ldc + j, ldc, true);
  }

 private:
  // Off the power of two, so that rows do not fall into the same cache set.
  static constexpr int64_t transposed_ld(int64_t rows) { return round_up(rows, kAlign) + kAlign; }

  // C[16 or 32, 32] (+)= left * panel
  static void block(bool two, int64_t depth, const Operand* left, int64_t ldl, const Operand* panel, A* c, int64_t ldc,
                    bool accumulate) {
    const int64_t stride = ldl * int64_t(sizeof(Operand)), panel_stride = kPanel * 4, c_stride = ldc * 4;
    if (accumulate) {
      _tile_loadd(0, c, c_stride);
      _tile_loadd(1, c + 16, c_stride);
      if (two) _tile_loadd(2, c + 16 * ldc, c_stride);
      if (two) _tile_loadd(3, c + 16 * ldc + 16, c_stride);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 32) {
      _tile_loadd(4, left + k, stride);
      _tile_loadd(6, panel + k * kPanel, panel_stride);
      _tile_loadd(7, panel + k * kPanel + 32, panel_stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (!two) continue;
      _tile_loadd(5, left + 16 * ldl + k, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_stride);
    _tile_stored(1, c + 16, c_stride);
    if (two) _tile_stored(2, c + 16 * ldc, c_stride);
    if (two) _tile_stored(3, c + 16 * ldc + 16, c_stride);
  }

  // [32, 16] to [16, 32]; rows from `rows` on are taken as zero.  Pairs of rows become one 32-bit number a column, and
  // the 16 x 16 matrix of these is transposed in registers.
  static void transpose_block(int64_t rows, const Operand* in, int64_t ldi, Operand* out, int64_t ldo) {
    const auto row = [&](int64_t r) {
      return r < rows ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + r * ldi)))
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
      _mm512_storeu_si512(out + q * ldo, _mm512_shuffle_i32x4(a, c, 0x88));
      _mm512_storeu_si512(out + (q + 4) * ldo, _mm512_shuffle_i32x4(a, c, 0xdd));
      _mm512_storeu_si512(out + (q + 8) * ldo, _mm512_shuffle_i32x4(b, d, 0x88));
      _mm512_storeu_si512(out + (q + 12) * ldo, _mm512_shuffle_i32x4(b, d, 0xdd));
    }
  }
};

}  // namespace fastdense::FASTDENSE_TARGET

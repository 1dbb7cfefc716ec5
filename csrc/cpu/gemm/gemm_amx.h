// SPDX-License-Identifier: Apache-2.0
// Gemm<bfloat16> on the tile registers of AMX-BF16 (see gemm.h): factors are rounded to bfloat16, sums are float32.
// A tile is 16 rows of 64 bytes; one instruction adds [16 rows, 32 deep] * [32 deep, 16 columns].
#pragma once

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
struct Gemm<bfloat16> : PairFactors {
  static void multiply(int64_t rows, int64_t depth, int64_t n, RowMajor<const Operand> left, const Operand* panels,
                       RowMajor<A> c, bool accumulate = false) {
    const TileScope scope;
    const int64_t deep = round_up(depth, kAlign);
    for (int64_t j = 0; j < n; j += kPanel)
      for (int64_t i = 0; i < rows; i += 32)
        block(rows - i > 16, deep, left.from(i, 0), panels + j * deep, c.from(i, j), accumulate);
  }

  static void multiply_transposed(int64_t rows, int64_t m, int64_t n, const Transposed& left, const Operand* panels,
                                  RowMajor<A> c) {
    const TileScope scope;
    const int64_t deep = round_up(rows, kAlign);
    for (int64_t j = 0; j < n; j += kPanel)
      for (int64_t i = 0; i < m; i += 32)
        block(m - i > 16, deep, {left.data + i * left.ld, left.ld}, panels + j * deep, c.from(i, j), true);
  }

 private:
  // C[16 or 32, 32] (+)= left * panel
  static void block(bool two, int64_t depth, RowMajor<const Operand> left, const Operand* panel, RowMajor<A> c,
                    bool accumulate) {
    const int64_t stride = left.ld * int64_t(sizeof(Operand)), panel_stride = kPanel * 4, c_stride = c.ld * 4;
    const Operand *const upper = left.data, *const lower = left.data + 16 * left.ld;
    A *const out = c.data, *const lower_out = c.data + 16 * c.ld;
    if (accumulate) {
      _tile_loadd(0, out, c_stride);
      _tile_loadd(1, out + 16, c_stride);
      if (two) _tile_loadd(2, lower_out, c_stride);
      if (two) _tile_loadd(3, lower_out + 16, c_stride);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 32) {
      _tile_loadd(4, upper + k, stride);
      _tile_loadd(6, panel + k * kPanel, panel_stride);
      _tile_loadd(7, panel + k * kPanel + 32, panel_stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (!two) continue;
      _tile_loadd(5, lower + k, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, c_stride);
    _tile_stored(1, out + 16, c_stride);
    if (two) _tile_stored(2, lower_out, c_stride);
    if (two) _tile_stored(3, lower_out + 16, c_stride);
  }
};

}  // namespace fastdense::FASTDENSE_TARGET

// SPDX-License-Identifier: Apache-2.0
// Bytes times weights of 16 bits on AVX-512, as torch rounds them: two products an element and instruction, sums of 32
// bits, and bytes between the axes.  The results are those of the code for int32_t in bicubic_kernels_impl.h, which
// includes this.

namespace fastdense::FASTDENSE_TARGET {

constexpr int64_t kShorts = 32;  // in a register

inline __mmask32 first_bytes(int64_t n) {
  return n >= kShorts ? ~__mmask32(0) : n > 0 ? (__mmask32(1) << n) - 1 : __mmask32(0);
}

// 32 bytes as integers of 16 bits; those from n on are 0 and not read.
inline __m512i load_bytes(const uint8_t* in, int64_t n) {
  return _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(first_bytes(n), in));
}

// Sums to integers from 0 on, halves up.
inline __m512i round_sums(__m512i sum, int bits) {
  const __m512i half = _mm512_set1_epi32(1 << (bits - 1));
  sum = _mm512_sra_epi32(_mm512_add_epi32(sum, half), _mm_cvtsi32_si128(bits));
  return _mm512_max_epi32(sum, _mm512_setzero_si512());
}

// Elements [0, n) of a row of the result, from `taps` rows that `rows` points to.
inline void short_rows(RowCursor<uint8_t> rows, const BicubicShort& m, const int16_t* weight, int64_t taps, int64_t n,
                       uint8_t* out) {
  for (int64_t at = 0; at < n; at += kShorts) {
    __m512i low = _mm512_setzero_si512(), high = low;
    int64_t slot = rows.slot;
    const auto next = [&] {
      const uint8_t* row = rows.base + slot * rows.stride + at;
      slot = slot + 1 == rows.period ? 0 : slot + 1;
      return load_bytes(row, n - at);
    };
    for (int64_t k = 0; k < taps; k += 2) {
      const __m512i a = next(), b = k + 1 < taps ? next() : a;  // of weight 0 behind the last
      int32_t pair;
      __builtin_memcpy(&pair, weight + k, sizeof(pair));
      const __m512i w = _mm512_set1_epi32(pair);
      low = _mm512_add_epi32(low, _mm512_madd_epi16(_mm512_unpacklo_epi16(a, b), w));
      high = _mm512_add_epi32(high, _mm512_madd_epi16(_mm512_unpackhi_epi16(a, b), w));
    }
    const __m512i both = _mm512_packs_epi32(round_sums(low, m.bits), round_sums(high, m.bits));
    _mm256_mask_storeu_epi8(out + at, first_bytes(n - at), _mm512_cvtusepi16_epi8(both));
  }
}

// A block of 16 elements whose taps lie within kRegisters * 32 elements from `in` on, of which `rest` exist.
template <int kRegisters>
inline __m512i short_block(const uint8_t* in, int64_t rest, const int32_t* index, const int16_t* weight, int64_t taps,
                           int inner) {
  __m512i part[kRegisters];
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) part[i] = load_bytes(in + kShorts * i, rest - kShorts * i);
  const __m512i first = _mm512_loadu_si512(index), second = _mm512_add_epi32(first, _mm512_set1_epi32(inner));
  __m512i at = _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
  const __m512i step = _mm512_set1_epi16(short(2 * inner));
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < taps; k += 2, at = _mm512_add_epi16(at, step)) {
    __m512i x = _mm512_permutex2var_epi16(part[0], at, part[1]);
    if constexpr (kRegisters == 4)
      x = _mm512_mask_mov_epi16(x, _mm512_cmpge_epi16_mask(at, _mm512_set1_epi16(2 * kShorts)),
                                _mm512_permutex2var_epi16(part[2], at, part[3]));
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(x, _mm512_loadu_si512(weight + k * kBicubicBlock)));
  }
  return sum;
}

// One row [width, inner] to [columns, inner].
inline void short_columns(const BicubicPlane<uint8_t, int32_t>& p, const uint8_t* in, uint8_t* out) {
  const BicubicMatrix<int32_t>& m = *p.columns;
  const BicubicShort& s = p.short_columns;
  const int64_t n = p.out_width();
  if (!s.lane_weight) {  // each element reads many neighbours
    for (int64_t o = 0; o < n; ++o) {
      __m512i sum = _mm512_setzero_si512();
      for (int64_t k = 0; k < m.taps; k += kShorts) {
        const __m512i x = load_bytes(in + m.start[o] + k, m.taps - k);
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(x, _mm512_loadu_si512(s.weight + o * s.padded + k)));
      }
      const int32_t rounded = (_mm512_reduce_add_epi32(sum) + (1 << (s.bits - 1))) >> s.bits;
      out[o] = uint8_t(rounded < 0 ? 0 : rounded > 255 ? 255 : rounded);
    }
    return;
  }
  const int64_t pairs = (m.taps + 1) / 2 * 2;
  for (int64_t at = 0, b = 0; at < n; at += kBicubicBlock, ++b) {
    const int32_t* index = p.lanes.index + at;
    const int16_t* weight = s.lane_weight + at * pairs;
    const int64_t first = p.lanes.first[b], rest = p.in_width() - first;
    const __m512i sum = p.lanes.span[b] <= 2 * kShorts
                            ? short_block<2>(in + first, rest, index, weight, m.taps, int(p.inner))
                            : short_block<4>(in + first, rest, index, weight, m.taps, int(p.inner));
    const __mmask16 mask = __mmask16(first_bytes(n - at < kBicubicBlock ? n - at : kBicubicBlock));
    _mm_mask_storeu_epi8(out + at, mask, _mm512_cvtusepi32_epi8(round_sums(sum, s.bits)));
  }
}

// Rows [begin, end) of the result; columns go first.
inline void resample_short(const BicubicPlane<uint8_t, int32_t>& p, int64_t begin, int64_t end, int32_t* workspace) {
  const int64_t n = p.out_width();
  if (!p.rows) {
    for (int64_t o = begin; o < end; ++o) short_columns(p, p.input + o * p.in_width(), p.output + o * n);
    return;
  }
  const BicubicMatrix<int32_t>& m = *p.rows;
  const BicubicShort& s = p.short_rows;
  uint8_t* ring = reinterpret_cast<uint8_t*>(workspace);
  int64_t next = m.start[begin];
  for (int64_t o = begin; o < end; ++o) {
    const int64_t first = m.start[o];
    RowCursor<uint8_t> rows{p.input + first * n, n};
    if (p.columns) {
      for (next = next < first ? first : next; next < first + m.taps; ++next)
        short_columns(p, p.input + next * p.in_width(), ring + next % m.taps * n);
      rows = {ring, n, first % m.taps, m.taps};
    }
    short_rows(rows, s, s.weight + o * s.padded, m.taps, n, p.output + o * n);
  }
}

}  // namespace fastdense::FASTDENSE_TARGET

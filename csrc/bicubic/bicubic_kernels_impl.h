// SPDX-License-Identifier: Apache-2.0
// The kernels of bicubic_kernels.h for one target.
#include "cpu/simd/vec.h"

namespace fastdense::FASTDENSE_TARGET {

// Rows stride apart, from `slot` on; a ring starts again after `period` rows.
template <typename R>
struct RowCursor {
  const R* base;
  int64_t stride;
  int64_t slot = 0;
  int64_t period = INT64_MAX;
};

constexpr int kChunkVectors = 8;
template <typename A>
constexpr int64_t kChunk = kChunkVectors * Vec<A>::kLanes;

// acc[i] = sum_k weight[k] * row_k[at + i] for i < n, in so many vectors; acc has room for all of them.
template <int kVectors, bool kWhole, typename A, typename R>
inline void combine_vectors(const RowCursor<R>& rows, const A* weight, int64_t taps, int64_t at, int64_t n, A* acc) {
  using V = Vec<A>;
  constexpr int64_t kCount = kVectors * V::kLanes;
  V sum[kVectors];
#pragma GCC unroll 8
  for (V& v : sum) v = V::splat(0);
  const R* row = rows.base + rows.slot * rows.stride + at;
  int64_t slot = rows.slot;
  for (int64_t k = 0; k < taps; ++k) {
    const V w = V::splat(weight[k]);
    const auto add = [&](const A* from) {
#pragma GCC unroll 8
      for (int u = 0; u < kVectors; ++u) sum[u] = V::fma(w, V::load(from + u * V::kLanes), sum[u]);
    };
    if constexpr (kWhole && std::is_same_v<A, R>) {
      add(row);
    } else {
      A converted[kCount];
      for (int64_t i = 0; i < kCount; ++i) converted[i] = kWhole || i < n ? widen<A>(row[i]) : A(0);
      add(converted);
    }
    if (++slot == rows.period) {
      slot = 0;
      row = rows.base + at;
    } else {
      row += rows.stride;
    }
  }
#pragma GCC unroll 8
  for (int u = 0; u < kVectors; ++u) sum[u].store(acc + u * V::kLanes);
}

// The same for n <= kChunk, in as few pieces as there are; acc has room for a whole chunk.
template <typename A, typename R, int kVectors = kChunkVectors>
inline void combine_rows(const RowCursor<R>& rows, const A* weight, int64_t taps, int64_t at, int64_t n, A* acc) {
  constexpr int64_t kCount = kVectors * Vec<A>::kLanes;
  if (n >= kCount) {
    combine_vectors<kVectors, true, A, R>(rows, weight, taps, at, kCount, acc);
    at += kCount;
    n -= kCount;
    acc += kCount;
  }
  if (n == 0) return;
  if constexpr (kVectors > 1)
    combine_rows<A, R, kVectors / 2>(rows, weight, taps, at, n, acc);
  else
    combine_vectors<1, false, A, R>(rows, weight, taps, at, n, acc);
}

// Rows that are combined in one go, since neighbours read much of the same.
constexpr int64_t kTogether = 2;
#if defined(FASTDENSE_TARGET_AVX512)
constexpr int kTogetherVectors = 8;
#else
constexpr int kTogetherVectors = 4;  // of half as many registers
#endif
template <typename A>
constexpr int64_t kTogetherChunk = kTogetherVectors * Vec<A>::kLanes;

// Rows o and o + 1 of the result, `out_stride` apart, a chunk of each; every row of the input is loaded once.
template <typename A>
inline void combine_together(const A* in, int64_t stride, const BicubicMatrix<A>& m, int64_t o, A* out,
                             int64_t out_stride) {
  using V = Vec<A>;
  V sum[kTogether][kTogetherVectors];
#pragma GCC unroll 4
  for (auto& of_row : sum)
#pragma GCC unroll 8
    for (V& v : of_row) v = V::splat(0);
  const int64_t shift = m.start[o + 1] - m.start[o];
  const A* row = in + m.start[o] * stride;
  const A *w0 = m.weight + o * m.taps, *w1 = w0 + m.taps;
  const auto add = [&](int j, const A* weight) {
    const V w = V::splat(*weight);
#pragma GCC unroll 8
    for (int u = 0; u < kTogetherVectors; ++u) sum[j][u] = V::fma(w, V::load(row + u * V::kLanes), sum[j][u]);
  };
  int64_t r = 0;
  for (; r < shift; ++r, row += stride) add(0, w0 + r);
  for (; r < m.taps; ++r, row += stride) {
    const V a = V::splat(w0[r]), b = V::splat(w1[r - shift]);
#pragma GCC unroll 8
    for (int u = 0; u < kTogetherVectors; ++u) {
      const V x = V::load(row + u * V::kLanes);
      sum[0][u] = V::fma(a, x, sum[0][u]);
      sum[1][u] = V::fma(b, x, sum[1][u]);
    }
  }
  for (; r < shift + m.taps; ++r, row += stride) add(1, w1 + r - shift);
#pragma GCC unroll 4
  for (int j = 0; j < kTogether; ++j)
#pragma GCC unroll 8
    for (int u = 0; u < kTogetherVectors; ++u) sum[j][u].store(out + j * out_stride + u * V::kLanes);
}

template <typename A>
inline void round_row(A* row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = round_between(row[i]);
}

// Elements [at, at + n) of a row of the output.
template <typename T, typename A>
inline void store_result(const BicubicPlane<T, A>& p, int64_t row, int64_t at, int64_t n, const A* v) {
  const int64_t first = row * p.out_width() + at;
  T* __restrict out = p.output + first;
  if constexpr (std::is_same_v<T, uint8_t> && std::is_same_v<A, float>) {
    if (p.half_up) {
      for (int64_t i = 0; i < n; ++i) out[i] = T(byte_half_up(v[i]));
      return;
    }
  }
  if (p.residual) {
    const T* residual = p.residual + first;
    for (int64_t i = 0; i < n; ++i) out[i] = finish_sample<T, A>(v[i] + widen<A>(residual[i]), p.low, p.high);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = finish_sample<T, A>(v[i], p.low, p.high);
  }
}

#if defined(FASTDENSE_TARGET_AVX512)
// 16 elements whose taps lie within kPairs * 32 elements from `in` on, of which `rest` exist: picked in registers.
template <int kPairs>
inline void resample_in_registers(const float* in, int64_t rest, const int32_t* index, const float* weight,
                                  int64_t taps, int64_t inner, float* out) {
  __m512 part[2 * kPairs];
#pragma GCC unroll 8
  for (int i = 0; i < 2 * kPairs; ++i) {
    const int64_t left = rest - 16 * i;
    part[i] = _mm512_maskz_loadu_ps(left >= 16 ? __mmask16(-1)
                                    : left > 0 ? __mmask16((1 << left) - 1)
                                               : __mmask16(0),
                                    in + 16 * i);
  }
  __m512i at = _mm512_loadu_si512(index);
  const __m512i step = _mm512_set1_epi32(int(inner));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < taps; ++k, at = _mm512_add_epi32(at, step)) {
    __m512 x = _mm512_permutex2var_ps(part[0], at, part[1]);
#pragma GCC unroll 4
    for (int pair = 1; pair < kPairs; ++pair)
      x = _mm512_mask_mov_ps(x, _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(32 * pair)),
                             _mm512_permutex2var_ps(part[2 * pair], at, part[2 * pair + 1]));
    sum = _mm512_fmadd_ps(_mm512_loadu_ps(weight + k * 16), x, sum);
  }
  _mm512_storeu_ps(out, sum);
}
#endif

// Block b of 16 elements of a row; `in` has `width` elements.
template <typename A>
inline void resample_block(const A* in, [[maybe_unused]] int64_t width, const BicubicLanes<A>& lanes, int64_t b,
                           int64_t taps, int64_t inner, A* out) {
  using V = Vec<A>;
  constexpr int kVectors = int(kBicubicBlock) / V::kLanes;
  const int32_t* index = lanes.index + b * kBicubicBlock;
  const A* weight = lanes.weight + b * taps * kBicubicBlock;
  const int64_t first = lanes.first[b];
#if defined(FASTDENSE_TARGET_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    const int64_t span = lanes.span[b], rest = width - first;
    if (span <= 32) return resample_in_registers<1>(in + first, rest, index, weight, taps, inner, out);
    if (span <= 64) return resample_in_registers<2>(in + first, rest, index, weight, taps, inner, out);
    if (span <= 128) return resample_in_registers<4>(in + first, rest, index, weight, taps, inner, out);
  }
#endif
  in += first;
  V sum[kVectors];
  for (V& v : sum) v = V::splat(0);
  for (int64_t k = 0; k < taps; ++k, in += inner, weight += kBicubicBlock)
    for (int u = 0; u < kVectors; ++u)
      sum[u] = V::fma(V::load(weight + u * V::kLanes), V::gather(in, index + u * V::kLanes), sum[u]);
  for (int u = 0; u < kVectors; ++u) sum[u].store(out + u * V::kLanes);
}

// One row [width, inner] to [columns, inner]; `out` has room for a whole block, or a chunk a pixel.
template <typename T, typename A>
inline void resample_columns(const BicubicPlane<T, A>& p, const A* in, A* out) {
  const BicubicMatrix<A>& m = *p.columns;
  if (p.inner < kBicubicWideInner) {
    const int64_t blocks = (p.out_width() + kBicubicBlock - 1) / kBicubicBlock;
    for (int64_t b = 0; b < blocks; ++b)
      resample_block(in, p.in_width(), p.lanes, b, m.taps, p.inner, out + b * kBicubicBlock);
    return;
  }
  for (int64_t o = 0; o < m.rows; ++o)
    for (int64_t c = 0; c < p.inner; c += kChunk<A>) {
      const int64_t n = p.inner - c < kChunk<A> ? p.inner - c : kChunk<A>;
      combine_rows<A, A>({in + m.start[o] * p.inner, p.inner}, m.weight + o * m.taps, m.taps, c, n,
                         out + o * p.inner + c);
    }
}

// A row of the input in the type of arithmetic: itself, or a copy in `memory`.
template <typename T, typename A>
inline const A* input_row(const BicubicPlane<T, A>& p, int64_t row, A* memory) {
  const T* in = p.input + row * p.in_width();
  if constexpr (std::is_same_v<T, A>) {
    return in;
  } else {
    A* __restrict out = memory;
    for (int64_t i = 0, n = p.in_width(); i < n; ++i) out[i] = widen<A>(in[i]);
    return memory;
  }
}

// Length of a workspace row that is written in whole blocks and chunks.
template <typename A>
constexpr int64_t workspace_row(int64_t n) {
  return (n + kChunk<A> + kBicubicBlock - 1) / kBicubicBlock * kBicubicBlock;
}

template <typename T, typename A>
void columns_then_rows(const BicubicPlane<T, A>& p, int64_t begin, int64_t end, A* workspace) {
  const BicubicMatrix<A>& m = *p.rows;
  const int64_t n = p.out_width(), stride = workspace_row<A>(n), period = m.taps;
  A *ring = workspace, *memory = ring + period * stride, *acc = memory + workspace_row<A>(p.in_width());
  int64_t next = m.start[begin];
  for (int64_t o = begin; o < end; ++o) {
    const int64_t first = m.start[o];
    for (next = next < first ? first : next; next < first + m.taps; ++next) {
      A* row = ring + next % period * stride;
      resample_columns(p, input_row(p, next, memory), row);
      if (p.round_between) round_row(row, n);
    }
    for (int64_t at = 0; at < n; at += kChunk<A>) {
      const int64_t width = n - at < kChunk<A> ? n - at : kChunk<A>;
      combine_rows<A, A>({ring, stride, first % period, period}, m.weight + o * m.taps, m.taps, at, width, acc);
      store_result(p, o, at, width, acc);
    }
  }
}

template <typename T, typename A>
void rows_then_columns(const BicubicPlane<T, A>& p, int64_t begin, int64_t end, A* workspace) {
  const BicubicMatrix<A>& m = *p.rows;
  const int64_t n = p.in_width(), stride = workspace_row<A>(n);
  A *rows = workspace, *out = rows + kTogether * stride;
  for (int64_t o = begin; o < end;) {
    int64_t count = 1, at = 0;
    if constexpr (std::is_same_v<T, A>) {
      if (o + kTogether <= end && m.start[o + 1] - m.start[o] < m.taps) {
        count = kTogether;
        for (; at + kTogetherChunk<A> <= n; at += kTogetherChunk<A>)
          combine_together(p.input + at, n, m, o, rows + at, stride);
      }
    }
    for (int64_t j = 0; j < count; ++j, ++o) {
      A* row = rows + j * stride;
      const RowCursor<T> from{p.input + m.start[o] * n, n};
      for (int64_t rest = at; rest < n; rest += kChunk<A>) {
        const int64_t width = n - rest < kChunk<A> ? n - rest : kChunk<A>;
        combine_rows<A, T>(from, m.weight + o * m.taps, m.taps, rest, width, row + rest);
      }
      if (p.columns && p.round_between) round_row(row, n);
      if (p.columns) resample_columns(p, row, out);
      store_result(p, o, 0, p.out_width(), p.columns ? out : row);
    }
  }
}

template <typename T, typename A>
void columns_only(const BicubicPlane<T, A>& p, int64_t begin, int64_t end, A* workspace) {
  A* out = workspace + workspace_row<A>(p.in_width());
  for (int64_t o = begin; o < end; ++o) {
    const A* row = input_row(p, o, workspace);
    if (p.columns) resample_columns(p, row, out);
    store_result(p, o, 0, p.out_width(), p.columns ? out : row);
  }
}

}  // namespace fastdense::FASTDENSE_TARGET

#if defined(FASTDENSE_TARGET_AVX512)
#include "bicubic/bicubic_short_impl.h"
#endif

namespace fastdense::FASTDENSE_TARGET {

template <typename T, typename A>
void resample(const BicubicPlane<T, A>& p, int64_t begin, int64_t end, A* workspace) {
#if defined(FASTDENSE_TARGET_AVX512)
  if constexpr (std::is_same_v<T, uint8_t> && std::is_same_v<A, int32_t>)
    if (p.is_short) return resample_short(p, begin, end, workspace);
#endif
  if (!p.rows) return columns_only(p, begin, end, workspace);
  if (p.columns && p.columns_first) return columns_then_rows(p, begin, end, workspace);
  rows_then_columns(p, begin, end, workspace);
}

template <typename T, typename A>
int64_t workspace_size(const BicubicPlane<T, A>& p) {
  const bool ring = p.rows && p.columns && p.columns_first;
  return (ring ? p.rows->taps : 1) * workspace_row<A>(p.out_width()) +
         (ring ? 1 : kTogether) * workspace_row<A>(p.in_width()) + kChunk<A>;
}

template <typename T, typename A>
BicubicKernel<T, A> bicubic_kernel() {
  return {resample<T, A>, workspace_size<T, A>};
}

template BicubicKernel<float, float> bicubic_kernel<float, float>();
template BicubicKernel<double, double> bicubic_kernel<double, double>();
template BicubicKernel<bfloat16, float> bicubic_kernel<bfloat16, float>();
template BicubicKernel<half, float> bicubic_kernel<half, float>();
template BicubicKernel<uint8_t, float> bicubic_kernel<uint8_t, float>();
template BicubicKernel<uint8_t, double> bicubic_kernel<uint8_t, double>();
template BicubicKernel<uint8_t, int32_t> bicubic_kernel<uint8_t, int32_t>();

}  // namespace fastdense::FASTDENSE_TARGET

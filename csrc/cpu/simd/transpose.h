// SPDX-License-Identifier: Apache-2.0
// Transposes small matrices in registers, for the instruction set named by FASTDENSE_TARGET.
#pragma once

#include "cpu/simd/vec.h"

namespace fastdense::FASTDENSE_TARGET {

// Exchanges the blocks of Step x Step numbers that two rows, Step apart, have off the diagonal of 2 Step x 2 Step.
template <int Step, typename V, int... Lane>
inline void exchange_blocks(V& a, V& b, std::integer_sequence<int, Lane...>) {
  constexpr int kLanes = sizeof...(Lane);
#if defined(__clang__)
  const V first = __builtin_shufflevector(a, b, ((Lane & Step) ? kLanes + Lane - Step : Lane)...);
  b = __builtin_shufflevector(a, b, ((Lane & Step) ? kLanes + Lane : Lane + Step)...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
  typedef Index Indices __attribute__((vector_size(sizeof(V))));
  const V first = __builtin_shuffle(a, b, Indices{((Lane & Step) ? kLanes + Lane - Step : Lane)...});
  b = __builtin_shuffle(a, b, Indices{((Lane & Step) ? kLanes + Lane : Lane + Step)...});
#endif
  a = first;
}

// Transposes all squares of Rows x Rows numbers that lie side by side in the rows.
template <int Step, int Rows, typename V>
inline void exchange_all(V (&rows)[Rows]) {
  if constexpr (Step < Rows) {
    constexpr int kLanes = sizeof(V) / sizeof(rows[0][0]);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
      if (!(i & Step)) exchange_blocks<Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, kLanes>());
    exchange_all<2 * Step>(rows);
  }
}

// out[c * ld_out + r] = in[r * ld_in + c] for r, c < Vec<A>::kLanes.
template <typename A>
inline void transpose_tile(const A* in, int64_t ld_in, A* out, int64_t ld_out) {
  constexpr int kLanes = Vec<A>::kLanes;
  decltype(Vec<A>::v) rows[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) rows[r] = Vec<A>::load(in + r * ld_in).v;
  exchange_all<1>(rows);
#pragma GCC unroll 16
  for (int c = 0; c < kLanes; ++c) Vec<A>{rows[c]}.store(out + c * ld_out);
}

// out[c * ld_out + r] = in[r * ld_in + c] for r < rows, c < columns.
template <typename A>
inline void transpose_matrix(const A* in, int64_t ld_in, int64_t rows, int64_t columns, A* out, int64_t ld_out) {
  constexpr int64_t kLanes = Vec<A>::kLanes;
  const int64_t whole_rows = rows / kLanes * kLanes, whole_columns = columns / kLanes * kLanes;
  for (int64_t c = 0; c < whole_columns; c += kLanes)
    for (int64_t r = 0; r < whole_rows; r += kLanes)
      transpose_tile(in + r * ld_in + c, ld_in, out + c * ld_out + r, ld_out);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r) out[c * ld_out + r] = in[r * ld_in + c];
}

}  // namespace fastdense::FASTDENSE_TARGET

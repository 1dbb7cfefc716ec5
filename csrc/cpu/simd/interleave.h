// SPDX-License-Identifier: Apache-2.0
// From [groups][channels] with the channels of a group side by side to [channels][groups] and back, for as many groups
// as a vector has lanes.
#pragma once

#include "cpu/simd/transpose.h"

namespace fastdense::FASTDENSE_TARGET {

// Numbers of a group that are moved together; a vector holds those of several groups.
template <typename A>
constexpr int kRun = Vec<A>::kLanes < 4 ? Vec<A>::kLanes : 4;

// A vector of runs that are `step` numbers apart.
template <typename A>
inline Vec<A> load_runs(const A* p, [[maybe_unused]] int64_t step) {
  if constexpr (kRun<A> == Vec<A>::kLanes) return Vec<A>::load(p);
#if defined(FASTDENSE_TARGET_AVX512)
  else if constexpr (sizeof(A) == 8)
    return {_mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_loadu_pd(p)), _mm256_loadu_pd(p + step), 1)};
  else {
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
    v = _mm512_insertf32x4(v, _mm_loadu_ps(p + step), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 2 * step), 2);
    return {_mm512_insertf32x4(v, _mm_loadu_ps(p + 3 * step), 3)};
  }
#elif defined(FASTDENSE_TARGET_AVX2)
  else
    return {_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + step), 1)};
#endif
}

// The reverse, run after run: where they overlap, the later one stays.
template <typename A>
inline void store_runs(Vec<A> v, A* p, [[maybe_unused]] int64_t step) {
  if constexpr (kRun<A> == Vec<A>::kLanes) v.store(p);
#if defined(FASTDENSE_TARGET_AVX512)
  else if constexpr (sizeof(A) == 8) {
    _mm256_storeu_pd(p, _mm512_castpd512_pd256(v.v));
    _mm256_storeu_pd(p + step, _mm512_extractf64x4_pd(v.v, 1));
  } else {
    _mm_storeu_ps(p, _mm512_castps512_ps128(v.v));
    _mm_storeu_ps(p + step, _mm512_extractf32x4_ps(v.v, 1));
    _mm_storeu_ps(p + 2 * step, _mm512_extractf32x4_ps(v.v, 2));
    _mm_storeu_ps(p + 3 * step, _mm512_extractf32x4_ps(v.v, 3));
  }
#elif defined(FASTDENSE_TARGET_AVX2)
  else {
    _mm_storeu_ps(p, _mm256_castps256_ps128(v.v));
    _mm_storeu_ps(p + step, _mm256_extractf128_ps(v.v, 1));
  }
#endif
}

// The group that a lane of [channels][groups] belongs to.
template <typename A>
inline int64_t group_of_lane(int64_t lane) {
  return lane % kRun<A> * (Vec<A>::kLanes / kRun<A>)+lane / kRun<A>;
}

// write(channel, its groups); up to kRun - 1 numbers behind those of the last group are read.
template <typename A, typename Write>
inline void take_groups_apart(const A* p, int64_t channels, const Write& write) {
  constexpr int kLength = kRun<A>, kCount = Vec<A>::kLanes / kLength;
  for (int64_t c = 0; c < channels; c += kLength) {
    decltype(Vec<A>::v) rows[kLength];
#pragma GCC unroll 16
    for (int i = 0; i < kLength; ++i) rows[i] = load_runs(p + i * kCount * channels + c, channels).v;
    exchange_all<1>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kLength; ++i)
      if (c + i < channels) write(c + i, Vec<A>{rows[i]});
  }
}

// The reverse of read(channel); up to kRun - 1 numbers behind those of the last group are overwritten.
template <typename A, typename Read>
inline void put_groups_together(int64_t channels, const Read& read, A* p) {
  constexpr int kLength = kRun<A>, kCount = Vec<A>::kLanes / kLength;
  // Backwards: what a run overwrites behind its group belongs to runs that are yet to come.
  for (int64_t c = (channels - 1) / kLength * kLength; c >= 0; c -= kLength) {
    decltype(Vec<A>::v) rows[kLength];
#pragma GCC unroll 16
    for (int i = 0; i < kLength; ++i) rows[i] = read(c + i < channels ? c + i : channels - 1).v;
    exchange_all<1>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kLength; ++i) store_runs(Vec<A>{rows[i]}, p + i * kCount * channels + c, channels);
  }
}

}  // namespace fastdense::FASTDENSE_TARGET

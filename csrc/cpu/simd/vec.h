// SPDX-License-Identifier: Apache-2.0
// SIMD vectors for the instruction set named by FASTDENSE_TARGET, of which each file has one (see target.h).
#pragma once

namespace fastdense::FASTDENSE_TARGET {

template <typename A>
struct Vec;

#if defined(FASTDENSE_TARGET_AVX512)
constexpr int kTileRows = 12;  // 12 x 2 accumulators of the 32 registers
template <>
struct Vec<float> {
  static constexpr int kLanes = 16;
  __m512 v;
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec gather(const float* p, const int32_t* i) { return {_mm512_i32gather_ps(_mm512_loadu_si512(i), p, 4)}; }
  static Vec splat(float s) { return {_mm512_set1_ps(s)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
};
template <>
struct Vec<double> {
  static constexpr int kLanes = 8;
  __m512d v;
  static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Vec gather(const double* p, const int32_t* i) {
    return {_mm512_i32gather_pd(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(i)), p, 8)};
  }
  static Vec splat(double s) { return {_mm512_set1_pd(s)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
};
template <>
struct Vec<int32_t> {
  static constexpr int kLanes = 16;
  __m512i v;
  static Vec load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  static Vec gather(const int32_t* p, const int32_t* i) {
    return {_mm512_i32gather_epi32(_mm512_loadu_si512(i), p, 4)};
  }
  static Vec splat(int32_t s) { return {_mm512_set1_epi32(s)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_add_epi32(_mm512_mullo_epi32(a.v, b.v), c.v)}; }
  void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
};
#elif defined(FASTDENSE_TARGET_AVX2)
constexpr int kTileRows = 6;  // 6 x 2 accumulators of the 16 registers
template <>
struct Vec<float> {
  static constexpr int kLanes = 8;
  __m256 v;
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  // Single loads: on an AMD EPYC the instruction that gathers takes more than twice as long.
  static Vec gather(const float* p, const int32_t* i) {
    return {_mm256_setr_ps(p[i[0]], p[i[1]], p[i[2]], p[i[3]], p[i[4]], p[i[5]], p[i[6]], p[i[7]])};
  }
  static Vec splat(float s) { return {_mm256_set1_ps(s)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
};
template <>
struct Vec<double> {
  static constexpr int kLanes = 4;
  __m256d v;
  static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static Vec gather(const double* p, const int32_t* i) {
    return {_mm256_i32gather_pd(p, _mm_loadu_si128(reinterpret_cast<const __m128i*>(i)), 8)};
  }
  static Vec splat(double s) { return {_mm256_set1_pd(s)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
};
template <>
struct Vec<int32_t> {
  static constexpr int kLanes = 8;
  __m256i v;
  static Vec load(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  static Vec gather(const int32_t* p, const int32_t* i) {
    return {_mm256_i32gather_epi32(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(i)), 4)};
  }
  static Vec splat(int32_t s) { return {_mm256_set1_epi32(s)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_add_epi32(_mm256_mullo_epi32(a.v, b.v), c.v)}; }
  void store(int32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
};
#else  // 16-byte vectors of the compiler: SSE2, NEON, or plain code
constexpr int kTileRows = 6;
template <typename A>
struct Vec {
  static constexpr int kLanes = 16 / sizeof(A);
  typedef A Native __attribute__((vector_size(16)));
  Native v;
  static Vec load(const A* p) {
    Vec r;
    __builtin_memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  static Vec gather(const A* p, const int32_t* i) {
    Vec r;
    for (int k = 0; k < kLanes; ++k) r.v[k] = p[i[k]];
    return r;
  }
  static Vec splat(A s) { return {s - Native{}}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  void store(A* p) const { __builtin_memcpy(p, &v, sizeof(v)); }
};
#endif

}  // namespace fastdense::FASTDENSE_TARGET

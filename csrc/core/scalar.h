// SPDX-License-Identifier: Apache-2.0
// Scalar building blocks shared by the CPU loops, the CUDA kernels and the tests.
//
// Storage types: float, double, and the two-byte bfloat16 (8 exponent bits) and half (5 exponent bits).
// Arithmetic is done in accumulate_t<T>: load(T) widens exactly, store<T>(v) rounds to nearest even; NaN
// stays NaN, infinities, subnormal numbers and overflow follow IEEE 754. The conversions are integer code
// with selects instead of branches, so that host compilers vectorise a loop over them, and they do not depend
// on the processor's flush-to-zero mode.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTDENSE_HD __host__ __device__ __forceinline__
#else
#define FASTDENSE_HD inline
#endif

namespace fastdense {

// Enumerations rather than structures: compilers vectorise loops over scalars only.
enum class bfloat16 : uint16_t {};
enum class half : uint16_t {};

FASTDENSE_HD uint16_t to_bits(bfloat16 v) { return static_cast<uint16_t>(v); }
FASTDENSE_HD uint16_t to_bits(half v) { return static_cast<uint16_t>(v); }

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

template <typename To, typename From>
FASTDENSE_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// The one multiply-add of every recomputed quantity. Fused on the device; two roundings on hosts, where a
// fused one is a library call unless the whole file targets FMA.
FASTDENSE_HD float mul_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

FASTDENSE_HD double mul_add(double a, double b, double c) {
#ifdef __CUDA_ARCH__
  return __fma_rn(a, b, c);
#else
  return a * b + c;
#endif
}

// NaN stays NaN, as in torch.relu; max(v, 0) would depend on the order of its arguments.
template <typename A>
FASTDENSE_HD A relu(A v) {
  return v < A(0) ? A(0) : v;
}

// Whether relu hands a gradient through: torch's threshold_backward stops it where v <= 0, so a NaN passes.
template <typename A>
FASTDENSE_HD bool relu_passes(A v) {
  return !(v <= A(0));
}

FASTDENSE_HD float load(float v) { return v; }
FASTDENSE_HD double load(double v) { return v; }

FASTDENSE_HD float load(bfloat16 v) { return bit_cast<float>(uint32_t(to_bits(v)) << 16); }

FASTDENSE_HD float load(half v) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(to_bits(v)));
#else
  constexpr uint32_t kRebias = (127 - 15) << 23;
  const uint32_t shifted = uint32_t(to_bits(v) & 0x7fff) << 13;
  const uint32_t exponent = shifted & 0x0f800000;
  const uint32_t rebiased = shifted + kRebias + (exponent == 0x0f800000 ? kRebias : 0);
  // A subnormal half gets the implicit one of 2^-14, which the subtraction takes away again.
  const float subnormal = bit_cast<float>(shifted + (113u << 23)) - bit_cast<float>(113u << 23);
  const uint32_t magnitude = exponent == 0 ? bit_cast<uint32_t>(subnormal) : rebiased;
  return bit_cast<float>(magnitude | uint32_t(to_bits(v) & 0x8000) << 16);
#endif
}

template <typename T>
FASTDENSE_HD T store(accumulate_t<T> v) {
  return v;
}

template <>
FASTDENSE_HD bfloat16 store<bfloat16>(float v) {
#ifdef __CUDA_ARCH__
  return bfloat16{__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#else
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const uint32_t quiet_nan = bits >> 16 | 0x40;
  return bfloat16{uint16_t((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded)};
#endif
}

template <>
FASTDENSE_HD half store<half>(float v) {
#ifdef __CUDA_ARCH__
  return half{__half_as_ushort(__float2half_rn(v))};
#else
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t normal = (magnitude - ((127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // Below 2^-14 the addition of 0.5, whose last bit is worth 2^-24, rounds to the spacing of subnormal
  // halves.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  return half{uint16_t((magnitude < (143u << 23) ? finite : special) | sign)};
#endif
}

}  // namespace fastdense

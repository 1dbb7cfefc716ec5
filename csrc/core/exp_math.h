// SPDX-License-Identifier: Apache-2.0
// The exponential, and tanh and sigmoid made of it, as plain arithmetic: host compilers vectorise a loop over elements.
#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace fastdense {

// What the exponential needs to know of a type: terms of the series on |r| <= ln(2) / 2, the number that moves the
// integer part into the last bits of the mantissa, ln 2 in two parts, the least argument whose result is normal, and
// the bits that half of a mantissa leaves out.
template <typename A>
struct ExpTraits;
template <>
struct ExpTraits<float> {
  using Bits = uint32_t;
  static constexpr int kTerms = 7, kMantissa = 23, kBias = 127;
  static constexpr float kShift = 12582912.0f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kLeast = -87.0f;
  static constexpr Bits kLowHalf = 0xfff;
};
template <>
struct ExpTraits<double> {
  using Bits = uint64_t;
  static constexpr int kTerms = 13, kMantissa = 52, kBias = 1023;
  static constexpr double kShift = 6755399441055744.0, kLn2High = 6.93145751953125e-1,
                          kLn2Low = 1.42860682030941723212e-6, kLeast = -708.0;
  static constexpr Bits kLowHalf = 0x7ffffff;
};

// exp(v) = power * (1 + rest) for v <= -kLeast, where power is 1 near 0: then rest is exp(v) - 1 without cancellation.
// exp(v) = 2^n exp(r) with n = round(v / ln 2); exp(r) - 1 = r + r^2 / 2 (1 + r/3 (1 + r/4 (...))). NaN stays NaN; v
// counts as kLeast where it is less. `low`, which is small, is added to v without rounding the sum.
template <typename A>
struct ExpParts {
  A power, rest;
};

template <typename A>
FASTDENSE_HD ExpParts<A> exp_parts(A v, A low = A(0)) {
  using Traits = ExpTraits<A>;
  using Bits = typename Traits::Bits;
  const A clamped = v < Traits::kLeast ? Traits::kLeast : v;
  const A shifted = clamped * A(1.44269504088896340736) + Traits::kShift;
  const A n = shifted - Traits::kShift;
  const A r = (clamped - n * Traits::kLn2High) - (n * Traits::kLn2Low - low);
  A series = A(1);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int k = Traits::kTerms; k > 2; --k) series = mul_add(series * r, A(1) / A(k), A(1));
  const Bits exponent = bit_cast<Bits>(shifted) - bit_cast<Bits>(Traits::kShift) + Traits::kBias;
  return {bit_cast<A>(exponent << Traits::kMantissa), mul_add(r * (A(0.5) * r), series, r)};
}

// exp(v) for v <= 0, and 0 where the result would be subnormal.
template <typename A>
FASTDENSE_HD A exp_of_nonpositive(A v, A low = A(0)) {
  const ExpParts<A> parts = exp_parts(v, low);
  return v < ExpTraits<A>::kLeast ? A(0) : (A(1) + parts.rest) * parts.power;
}

// The upper half of the digits: products of halves are exact.
template <typename A>
FASTDENSE_HD A upper_half(A a) {
  return bit_cast<A>(bit_cast<typename ExpTraits<A>::Bits>(a) & ~ExpTraits<A>::kLowHalf);
}

// a b + c without what a product rounds off, where c is about -a b.
template <typename A>
FASTDENSE_HD A exact_mul_add(A a, A b, A c) {
  const A high = upper_half(a), low = a - high, other_high = upper_half(b), other_low = b - other_high;
  return ((high * other_high + c) + (high * other_low + low * other_high)) + low * other_low;
}

// exp(-t^2 / 2) for t >= 0, in parts.
template <typename A>
FASTDENSE_HD ExpParts<A> exp_parts_of_half_square(A t) {
  const A high = upper_half(t), v = A(-0.5) * (high * high);
  const ExpParts<A> parts = exp_parts(v, A(-0.5) * ((t - high) * (t + high)));
  return {v < ExpTraits<A>::kLeast ? A(0) : parts.power, parts.rest};
}

// With m = 1 - exp(-2 |v|): tanh |v| = m / (2 - m).
template <typename A>
FASTDENSE_HD A tanh_of(A v) {
  const ExpParts<A> parts = exp_parts(v < A(0) ? v + v : -(v + v));
  const A product = parts.power * parts.rest;
  const A magnitude = ((A(1) - parts.power) - product) / ((A(1) + parts.power) + product);
  return v < A(0) ? -magnitude : magnitude;
}

// factor * sigmoid(v) = factor / (1 + exp(-v)), and factor * 0 where exp(v) would be subnormal.
template <typename A>
FASTDENSE_HD A times_sigmoid(A factor, A v) {
  const bool is_far = v < ExpTraits<A>::kLeast;
  const ExpParts<A> parts = exp_parts(is_far ? -ExpTraits<A>::kLeast : -v);
  const A product = factor / ((A(1) + parts.power) + parts.power * parts.rest);
  return is_far ? factor * A(0) : product;
}

// t = sigmoid(v) and c = 1 - t
template <typename A>
struct Sigmoid {
  A t, c;
};

template <typename A>
FASTDENSE_HD Sigmoid<A> sigmoid_of(A v) {
  const A small = exp_of_nonpositive(v < A(0) ? v : -v);
  const A large_share = A(1) / (A(1) + small), small_share = small * large_share;
  return {v < A(0) ? small_share : large_share, v < A(0) ? large_share : small_share};
}

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
// Scalar maths of resampling, shared by every device: the cubic kernel, where an output lies on the input axis, and
// what the border does with taps outside.  A resampled axis is a banded matrix; rows of it are made of these.
//
// R. G. Keys, "Cubic convolution interpolation for digital image processing", 1981, equation 15.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/scalar.h"

namespace fastdense {

// h_a(x): (a+2)|x|^3 - (a+3)|x|^2 + 1 up to 1, a|x|^3 - 5a|x|^2 + 8a|x| - 4a up to 2, 0 beyond.
template <typename A>
FASTDENSE_HD A cubic_kernel(A x, A a) {
  x = x < A(0) ? -x : x;
  if (x < A(1)) return ((a + A(2)) * x - (a + A(3))) * x * x + A(1);
  if (x < A(2)) return (((x - A(5)) * x + A(8)) * x - A(4)) * a;
  return A(0);
}

constexpr int kCubicRadius = 2;

enum class Border { kClamp, kDrop, kSymmetric };

// Index of the sample that stands for tap j of an axis of n samples, or -1 where the tap is left out.
FASTDENSE_HD int64_t border_index(int64_t j, int64_t n, Border border) {
  if (0 <= j && j < n) return j;
  if (border == Border::kDrop) return -1;
  if (border == Border::kClamp) return j < 0 ? 0 : n - 1;
  const int64_t period = 2 * n, at = ((j % period) + period) % period;  // reflected, the edge sample repeated
  return at < n ? at : period - 1 - at;
}

// An 8-bit sample: the nearest integer, saturated; halves up, as in MATLAB.
template <typename A>
FASTDENSE_HD A byte_half_up(A v) {
  v = v < A(0) ? A(0) : v > A(255) ? A(255) : v;
  return A(int(v + A(0.5)));
}

// Halves to the even neighbour, as in OpenCV: adding 1.5 * 2^23 leaves a float no fractional bits.
FASTDENSE_HD float byte_half_even(float v) {
  v = v < 0.0f ? 0.0f : v > 255.0f ? 255.0f : v;
  constexpr float kNoFraction = 12582912.0f;
  return (v + kNoFraction) - kNoFraction;
}

// Pillow's fixed-point weights have 22 fractional bits; sums are rounded halves up.
constexpr int kFixedBits = 22;

FASTDENSE_HD int32_t byte_of_fixed(int32_t v) {
  const int32_t rounded = (v + (1 << (kFixedBits - 1))) >> kFixedBits;
  return rounded < 0 ? 0 : rounded > 255 ? 255 : rounded;
}

// Which axis Pillow 13 takes first, since it does less work then: the rows where they shrink by more than twice as many
// samples as the columns do.  Found by comparing results; until Pillow 12 the columns always went first.
FASTDENSE_HD bool pillow_rows_first(int64_t height, int64_t width, int64_t out_height, int64_t out_width) {
  return out_height < height && height - out_height > 2 * (width - out_width);
}

// One term of a sum, in the type of arithmetic.
template <typename A>
FASTDENSE_HD A add_tap(A weight, A x, A sum) {
  return mul_add(weight, x, sum);
}
FASTDENSE_HD int32_t add_tap(int32_t weight, int32_t x, int32_t sum) { return sum + weight * x; }

// A stored sample in the type of arithmetic.
template <typename A, typename T>
FASTDENSE_HD A widen(T v) {
  if constexpr (std::is_integral_v<T>)
    return A(v);
  else
    return load(v);
}

// To bytes, after the first of two axes.
template <typename A>
FASTDENSE_HD A round_between(A v) {
  if constexpr (std::is_same_v<A, int32_t>)
    return byte_of_fixed(v);
  else
    return byte_half_up(v);
}

// What is stored of a finished sum: bytes are rounded and saturated, other types clamped.  NaN stays NaN.
template <typename T, typename A>
FASTDENSE_HD T finish_sample(A v, A low, A high) {
  if constexpr (std::is_same_v<A, int32_t>) {
    return T(byte_of_fixed(v));
  } else if constexpr (std::is_same_v<T, uint8_t>) {
    if constexpr (std::is_same_v<A, float>)
      return T(byte_half_even(v));
    else
      return T(byte_half_up(v));
  } else {
    return store<T>(v < low ? low : v > high ? high : v);
  }
}

}  // namespace fastdense

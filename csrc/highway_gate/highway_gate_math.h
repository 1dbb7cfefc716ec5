// SPDX-License-Identifier: Apache-2.0
// The gate of a highway layer. Both halves of a projection [outer, 2, block] meet the input [outer, block]:
//
//   h = act(first half)    t = sigmoid(second half)    y = x + t * (h - x) = t * h + (1 - t) * x
//
// and for the gradient g of y:
//
//   dx = g * (1 - t)    dfirst = g * t * act'(first)    dsecond = g * (h - x) * t * (1 - t)
//
// 1 - t is computed without cancellation, so that a gate which is nearly open still learns. exp and tanh are plain
// arithmetic, so that host compilers vectorise a loop over elements.
// Srivastava, Greff, Schmidhuber: Highway networks. arXiv:1505.00387 (2015), equation 3.
#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace fastdense {

struct HighwayRelu {
  template <typename A>
  FASTDENSE_HD static A value(A v) {
    return relu(v);
  }
  // Derivative at v, where the value is h.
  template <typename A>
  FASTDENSE_HD static A slope(A v, A) {
    return relu_passes(v) ? A(1) : A(0);
  }
};

struct HighwayIdentity {
  template <typename A>
  FASTDENSE_HD static A value(A v) {
    return v;
  }
  template <typename A>
  FASTDENSE_HD static A slope(A, A) {
    return A(1);
  }
};

// What the exponential needs to know of a type: terms of the series on |r| <= ln(2) / 2, the number that moves the
// integer part into the last bits of the mantissa, ln 2 in two parts, the least argument whose result is normal.
template <typename A>
struct ExpTraits;
template <>
struct ExpTraits<float> {
  using Bits = uint32_t;
  static constexpr int kTerms = 7, kMantissa = 23, kBias = 127;
  static constexpr float kShift = 12582912.0f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kLeast = -87.0f;
};
template <>
struct ExpTraits<double> {
  using Bits = uint64_t;
  static constexpr int kTerms = 13, kMantissa = 52, kBias = 1023;
  static constexpr double kShift = 6755399441055744.0, kLn2High = 6.93145751953125e-1,
                          kLn2Low = 1.42860682030941723212e-6, kLeast = -708.0;
};

// exp(v) = power * (1 + rest) for v <= 0, where power is 1 near 0: then rest is exp(v) - 1 without cancellation.
// exp(v) = 2^n exp(r) with n = round(v / ln 2); exp(r) = 1 + r (1 + r/2 (1 + r/3 (...))). NaN stays NaN; v counts as
// kLeast where it is less.
template <typename A>
struct ExpParts {
  A power, rest;
};

template <typename A>
FASTDENSE_HD ExpParts<A> exp_parts(A v) {
  using Traits = ExpTraits<A>;
  using Bits = typename Traits::Bits;
  const A clamped = v < Traits::kLeast ? Traits::kLeast : v;
  const A shifted = clamped * A(1.44269504088896340736) + Traits::kShift;
  const A n = shifted - Traits::kShift;
  const A r = (clamped - n * Traits::kLn2High) - n * Traits::kLn2Low;
  A series = A(1);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int k = Traits::kTerms; k > 1; --k) series = mul_add(series * r, A(1) / A(k), A(1));
  const Bits exponent = bit_cast<Bits>(shifted) - bit_cast<Bits>(Traits::kShift) + Traits::kBias;
  return {bit_cast<A>(exponent << Traits::kMantissa), series * r};
}

// exp(v) for v <= 0, and 0 where the result would be subnormal.
template <typename A>
FASTDENSE_HD A exp_of_nonpositive(A v) {
  const ExpParts<A> parts = exp_parts(v);
  return v < ExpTraits<A>::kLeast ? A(0) : (A(1) + parts.rest) * parts.power;
}

struct HighwayTanh {
  // With m = 1 - exp(-2 |v|): tanh |v| = m / (2 - m).
  template <typename A>
  FASTDENSE_HD static A value(A v) {
    const ExpParts<A> parts = exp_parts(v < A(0) ? v + v : -(v + v));
    const A m = (A(1) - parts.power) - parts.power * parts.rest;
    const A magnitude = m / (A(2) - m);
    return v < A(0) ? -magnitude : magnitude;
  }
  template <typename A>
  FASTDENSE_HD static A slope(A, A h) {
    return A(1) - h * h;
  }
};

// t = sigmoid(v) and c = 1 - t
template <typename A>
struct HighwayGateValue {
  A t, c;
};

template <typename A>
FASTDENSE_HD HighwayGateValue<A> highway_sigmoid(A v) {
  const A small = exp_of_nonpositive(v < A(0) ? v : -v);
  const A large_share = A(1) / (A(1) + small), small_share = small * large_share;
  return {v < A(0) ? small_share : large_share, v < A(0) ? large_share : small_share};
}

template <typename Activation, typename A>
FASTDENSE_HD A highway_output(A x, A first, A second) {
  return mul_add(highway_sigmoid(second).t, Activation::value(first) - x, x);
}

template <typename A>
struct HighwayGradients {
  A input, first, second;
};

template <typename Activation, typename A>
FASTDENSE_HD HighwayGradients<A> highway_gradients(A g, A x, A first, A second) {
  const HighwayGateValue<A> gate = highway_sigmoid(second);
  const A h = Activation::value(first);
  return {g * gate.c, g * gate.t * Activation::slope(first, h), g * (h - x) * (gate.t * gate.c)};
}

// Functors over the elements of the input. `projected` is the place of an element's first half; the second half lies
// `block` further on. element(i, i + i / block * block) is element i.
template <typename T, typename Activation>
struct HighwayForward {
  const T* input;       // [outer, block]
  const T* projection;  // [outer, 2, block]
  T* output;            // [outer, block]
  int64_t block;

  FASTDENSE_HD void element(int64_t i, int64_t projected) const {
    output[i] = store<T>(
        highway_output<Activation>(load(input[i]), load(projection[projected]), load(projection[projected + block])));
  }
  FASTDENSE_HD void operator()(int64_t i) const { element(i, i + i / block * block); }
};

template <typename T, typename Activation>
struct HighwayBackward {
  const T* grad_output;  // [outer, block]
  const T* input;        // [outer, block]
  const T* projection;   // [outer, 2, block]
  T* grad_input;         // [outer, block]
  T* grad_projection;    // [outer, 2, block]
  int64_t block;

  FASTDENSE_HD void element(int64_t i, int64_t projected) const {
    const auto grads = highway_gradients<Activation>(load(grad_output[i]), load(input[i]), load(projection[projected]),
                                                     load(projection[projected + block]));
    grad_input[i] = store<T>(grads.input);
    grad_projection[projected] = store<T>(grads.first);
    grad_projection[projected + block] = store<T>(grads.second);
  }
  FASTDENSE_HD void operator()(int64_t i) const { element(i, i + i / block * block); }
};

}  // namespace fastdense

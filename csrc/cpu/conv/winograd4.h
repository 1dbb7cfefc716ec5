// SPDX-License-Identifier: Apache-2.0
// Winograd's minimal filtering F(4x4, 3x3): a square of 4x4 results from a patch of 6x6 pixels by 36 products, 2.25 a
// pixel where F(2x2, 3x3) of winograd.h has 4 and the sum over taps 9.
//
// The transforms evaluate polynomials at 0, +-3/4, +-3/2 and infinity.  These points round less than 0, +-1, +-2:
// errors are about half as large.  All numbers of B^T and A^T are fractions of powers of two, so they are exact.
#pragma once

#include "cpu/conv/winograd.h"

namespace fastdense::FASTDENSE_TARGET {

constexpr int64_t kWinograd4Step = 4, kWinograd4Patch = 6, kWinograd4Products = kWinograd4Patch * kWinograd4Patch;

template <typename A>
struct Winograd4 {
  static constexpr A kP = A(0.75), kQ = A(1.5);  // the points, beside 0 and infinity
  static constexpr A kP2 = kP * kP, kQ2 = kQ * kQ;
  static constexpr A kSum = kP2 + kQ2, kProduct = kP2 * kQ2;

  // B^T: coefficients of x (x^2 - P^2) (x^2 - Q^2) divided by x - point, and of all of it for infinity.
  static void input(const A (&d)[6], A (&v)[6]) {
    const A even_p = mul_add(-kQ2, d[2], d[4]), half_p = mul_add(-kQ2, d[1], d[3]);
    const A even_q = mul_add(-kP2, d[2], d[4]), half_q = mul_add(-kP2, d[1], d[3]);
    v[0] = mul_add(kProduct, d[0], mul_add(-kSum, d[2], d[4]));
    v[1] = mul_add(kP, half_p, even_p);
    v[2] = mul_add(-kP, half_p, even_p);
    v[3] = mul_add(kQ, half_q, even_q);
    v[4] = mul_add(-kQ, half_q, even_q);
    v[5] = mul_add(kProduct, d[1], mul_add(-kSum, d[3], d[5]));
  }

  // G: values of the kernel at the points, over the derivative of the polynomial of B^T there.
  static void kernel(const A (&g)[3], A (&u)[6]) {
    constexpr A kOverZero = A(1) / kProduct;
    constexpr A kOverP = A(1) / (2 * kP2 * (kP2 - kQ2)), kOverQ = A(1) / (2 * kQ2 * (kQ2 - kP2));
    const A even_p = kOverP * (g[0] + kP2 * g[2]), odd_p = kOverP * kP * g[1];
    const A even_q = kOverQ * (g[0] + kQ2 * g[2]), odd_q = kOverQ * kQ * g[1];
    u[0] = kOverZero * g[0];
    u[1] = even_p + odd_p;
    u[2] = even_p - odd_p;
    u[3] = even_q + odd_q;
    u[4] = even_q - odd_q;
    u[5] = g[2];
  }

  // A^T: powers of the points.
  static void output(const A (&m)[6], A (&y)[4]) {
    const A even_p = m[1] + m[2], odd_p = m[1] - m[2], even_q = m[3] + m[4], odd_q = m[3] - m[4];
    y[0] = m[0] + even_p + even_q;
    y[1] = mul_add(kP, odd_p, kQ * odd_q);
    y[2] = mul_add(kP2, even_p, kQ2 * even_q);
    y[3] = mul_add(kP * kP2, odd_p, mul_add(kQ * kQ2, odd_q, m[5]));
  }
};

}  // namespace fastdense::FASTDENSE_TARGET

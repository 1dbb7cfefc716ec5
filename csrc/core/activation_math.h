// SPDX-License-Identifier: Apache-2.0
// Activations that may stand behind a norm, and their derivatives: value(u) and slope(u) of u = scale * x + shift,
// which the backward pass makes again from x.  Each follows the definition of the module of torch.nn with its name; `p`
// has what that module is constructed with.  Plain arithmetic: host compilers vectorise a loop over elements.
//
// Exponentials are of negative numbers alone and differences of nearly equal numbers are avoided, so that results keep
// their digits where those of the formula in the comment would not.
#pragma once

#include "core/exp_math.h"
#include "core/scalar.h"

namespace fastdense {

enum class Activation {
  kRelu,
  kIdentity,
  kRelu6,
  kLeakyRelu,  // and PReLU, whose slope is a parameter
  kElu,        // and CELU, SELU
  kSilu,
  kGelu,
  kGeluTanh,
  kHardswish,
  kMish,
  kSoftplus,
  kTanh,
  kSigmoid,
};

template <typename A>
struct ActivationParameters {
  A a = 0, b = 0, c = 0;
};

// The share of a standard normal distribution below u, and its density there, by exp(-t^2 / 2) and Mills' ratio of
// t = |u|: this, times 1 + t, is a polynomial in (t - 4) / (t + 4) (of the least relative error; in double interpolated
// at Chebyshev nodes). What the last sum and the quotient round off is made up for: the tail is good to 2.2 units in
// the last place.
template <typename A>
struct NormalDistribution {
  A share, density;
};

// Terms stand in functions: device code does not see constants of structures.
template <typename A>
struct MillsRatio;
template <>
struct MillsRatio<float> {
  static constexpr float kFarthest = 14, kFirstLow = 6.8869661e-9f;  // behind the digits of the first term
  static constexpr int kTerms = 11;
  FASTDENSE_HD static float term(int k) {
    static constexpr float kPolynomial[] = {0.4720532f,       -0.09670346975f,   0.01399959158f,   0.02859999612f,
                                            -0.03219718114f,  0.01794015616f,    -0.005004897248f, -0.0003040908778f,
                                            0.0006936739082f, -5.937487003e-05f, -7.117406494e-05f};
    return kPolynomial[k];
  }
};
template <>
struct MillsRatio<double> {
  static constexpr double kFarthest = 40, kFirstLow = 0;
  static constexpr int kTerms = 23;
  FASTDENSE_HD static double term(int k) {
    static constexpr double kPolynomial[] = {
        0.4720532065098446666,     -0.09670347732652537852,    0.01399963472443007881,     0.02860036405350589264,
        -0.03219783742834326119,   0.01793609748103932384,     -0.005002378585404055077,   -0.0002856231167159992294,
        0.0006948970401931862198,  -0.00009443011548018516773, -0.00008785274947955091298, 0.00002124945522796939981,
        0.00001362502519397404663, -3.430698277166074367e-6,   -2.607839079804581324e-6,   4.024274810143224075e-7,
        5.430039920605985295e-7,   2.351336257799606204e-9,    -1.010464456953636086e-7,   -1.853854208356331306e-8,
        1.140086786578558242e-8,   4.23785422278937983e-9,     1.551343890591842326e-10};
    return kPolynomial[k];
  }
};

template <typename A>
FASTDENSE_HD NormalDistribution<A> normal_distribution(A u) {
  using Ratio = MillsRatio<A>;
  const A magnitude = u < A(0) ? -u : u;
  const A t = magnitude > Ratio::kFarthest ? Ratio::kFarthest : magnitude;
  const A y = (t - A(4)) / (t + A(4));
  const ExpParts<A> e = exp_parts_of_half_square(t);
  A others = Ratio::term(Ratio::kTerms - 1);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int k = Ratio::kTerms - 2; k > 0; --k) others = mul_add(others, y, Ratio::term(k));
  const A sum = mul_add(others, y, Ratio::term(0));
  const A sum_low = exact_mul_add(others, y, Ratio::term(0) - sum) + Ratio::kFirstLow;
  const A divisor = A(1) + t, divisor_low = t - (divisor - A(1)), inverse = A(1) / divisor;
  const A ratio = sum * inverse;
  const A ratio_low = (exact_mul_add(-ratio, divisor, sum) + (sum_low - ratio * divisor_low)) * inverse;
  const A tail = e.power * (ratio + mul_add(ratio, e.rest, ratio_low));
  return {u < A(0) ? tail : A(1) - tail, (A(1) + e.rest) * e.power * A(0.398942280401432678)};
}

// log(1 + z) for 0 <= z <= 1: with s = z / (2 + z), 2 (s + s^3 / 3 + s^5 / 5 + ...).
template <typename A>
FASTDENSE_HD A log1p_of_share(A z) {
  constexpr int kTerms = sizeof(A) == sizeof(float) ? 8 : 17;
  const A s = z / (A(2) + z), square = s * s;
  A sum = A(0);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int k = kTerms - 1; k > 0; --k) sum = (sum + A(1) / A(2 * k + 1)) * square;
  return A(2) * (s + s * sum);
}

template <Activation kind>
struct ActivationFunction;

template <>
struct ActivationFunction<Activation::kRelu> {
  template <typename A>
  FASTDENSE_HD static A value(A u, const ActivationParameters<A>&) {
    return relu(u);
  }
  template <typename A>
  FASTDENSE_HD static A slope(A u, const ActivationParameters<A>&) {
    return relu_passes(u) ? A(1) : A(0);
  }
};

template <>
struct ActivationFunction<Activation::kIdentity> {
  template <typename A>
  FASTDENSE_HD static A value(A u, const ActivationParameters<A>&) {
    return u;
  }
  template <typename A>
  FASTDENSE_HD static A slope(A, const ActivationParameters<A>&) {
    return A(1);
  }
};

// min(max(u, 0), 6)
template <>
struct ActivationFunction<Activation::kRelu6> {
  template <typename A>
  FASTDENSE_HD static A value(A u, const ActivationParameters<A>&) {
    const A v = relu(u);
    return v > A(6) ? A(6) : v;
  }
  template <typename A>
  FASTDENSE_HD static A slope(A u, const ActivationParameters<A>&) {
    const A below = u <= A(0) ? A(0) : A(1);
    return u >= A(6) ? A(0) : below;
  }
};

// a u where u <= 0
template <>
struct ActivationFunction<Activation::kLeakyRelu> {
  // `a` may differ by channel.
  template <typename A>
  FASTDENSE_HD static A value(A u, A a) {
    return u > A(0) ? u : u * a;
  }
  template <typename A>
  FASTDENSE_HD static A slope(A u, A a) {
    return u > A(0) ? A(1) : a;
  }
  template <typename A>
  FASTDENSE_HD static A value(A u, const ActivationParameters<A>& p) {
    return value(u, p.a);
  }
  template <typename A>
  FASTDENSE_HD static A slope(A u, const ActivationParameters<A>& p) {
    return slope(u, p.a);
  }
};

// a (exp(c u) - 1) where u <= 0, else b u; ELU has b = c = 1, CELU a c = 1, SELU c = 1 and fixed a, b
template <>
struct ActivationFunction<Activation::kElu> {
  template <typename A>
  FASTDENSE_HD static A value(A u, const ActivationParameters<A>& p) {
    const ExpParts<A> parts = exp_parts(u > A(0) ? A(0) : u * p.c);
    const A below = p.a * ((parts.power - A(1)) + parts.power * parts.rest);
    return u > A(0) ? u * p.b : below;
  }
  template <typename A>
  FASTDENSE_HD static A slope(A u, const ActivationParameters<A>& p) {
    return u > A(0) ? p.b : p.a * p.c * exp_of_nonpositive(u > A(0) ? A(0) : u * p.c);
  }
};

// u sigmoid(u)
template <>
struct ActivationFunction<Activation::kSilu> {
  template <typename A>
  FASTDENSE_HD static A value(A u, const ActivationParameters<A>&) {
    return times_sigmoid(u, u);
  }
  template <typename A>
  FASTDENSE_HD static A slope(A u, const ActivationParameters<A>&) {
    const Sigmoid<A> s = sigmoid_of(u);
    return s.t * (A(1) + u * s.c);
  }
};

// u (1 + erf(u / sqrt(2))) / 2
template <>
struct ActivationFunction<Activation::kGelu> {
  template <typename A>
  FASTDENSE_HD static A value(A u, const ActivationParameters<A>&) {
    return u * normal_distribution(u).share;
  }
  template <typename A>
  FASTDENSE_HD static A slope(A u, const ActivationParameters<A>&) {
    const NormalDistribution<A> n = normal_distribution(u);
    return n.share + u * n.density;
  }
};

// u (1 + tanh(w)) / 2 = u sigmoid(2 w) with w = sqrt(2 / pi) (u + 0.044715 u^3)
template <>
struct ActivationFunction<Activation::kGeluTanh> {
  template <typename A>
  FASTDENSE_HD static A value(A u, const ActivationParameters<A>&) {
    return times_sigmoid(u, doubled(u));
  }
  template <typename A>
  FASTDENSE_HD static A slope(A u, const ActivationParameters<A>&) {
    const Sigmoid<A> s = sigmoid_of(doubled(u));
    const A derivative = A(1.59576912160573071) * (A(1) + A(3 * 0.044715) * (u * u));
    return s.t * (A(1) + (u * s.c) * derivative);
  }

 private:
  template <typename A>
  FASTDENSE_HD static A doubled(A u) {
    return A(1.59576912160573071) * (u * (A(1) + A(0.044715) * (u * u)));
  }
};

// u min(max(u + 3, 0), 6) / 6
template <>
struct ActivationFunction<Activation::kHardswish> {
  template <typename A>
  FASTDENSE_HD static A value(A u, const ActivationParameters<A>&) {
    const A raised = relu(u + A(3));
    return u * (raised > A(6) ? A(6) : raised) / A(6);
  }
  template <typename A>
  FASTDENSE_HD static A slope(A u, const ActivationParameters<A>&) {
    const A above = u < A(3) ? mul_add(u, A(1) / A(3), A(0.5)) : A(1);
    return u <= A(-3) ? A(0) : above;
  }
};

// u tanh(softplus(u)); the tangent is n / d with n = e (e + 2), d = n + 2 of e = exp(u), or the same by exp(-2 u).
template <>
struct ActivationFunction<Activation::kMish> {
  template <typename A>
  FASTDENSE_HD static A value(A u, const ActivationParameters<A>&) {
    const Tangent<A> t = tangent(u);
    return u * (t.above / (t.above + t.rest));
  }
  template <typename A>
  FASTDENSE_HD static A slope(A u, const ActivationParameters<A>&) {
    const Tangent<A> t = tangent(u);
    const A inverse = A(1) / (t.above + t.rest), value = t.above * inverse;
    const A one_minus_square = (t.rest * inverse) * (A(1) + value);
    return value + u * one_minus_square * (u < A(0) ? t.z : A(1)) / (A(1) + t.z);
  }

 private:
  template <typename A>
  struct Tangent {
    A z, above, rest;  // exp(-|u|); n and d - n
  };
  template <typename A>
  FASTDENSE_HD static Tangent<A> tangent(A u) {
    const A z = exp_of_nonpositive(u < A(0) ? u : -u);
    return {z, u < A(0) ? z * (z + A(2)) : A(1) + A(2) * z, u < A(0) ? A(2) : A(2) * (z * z)};
  }
};

// log(1 + exp(a u)) / a, and u where a u > b
template <>
struct ActivationFunction<Activation::kSoftplus> {
  template <typename A>
  FASTDENSE_HD static A value(A u, const ActivationParameters<A>& p) {
    const A v = p.a * u;
    const A smooth = (relu(v) + log1p_of_share(exp_of_nonpositive(v < A(0) ? v : -v))) / p.a;
    return v > p.b ? u : smooth;
  }
  template <typename A>
  FASTDENSE_HD static A slope(A u, const ActivationParameters<A>& p) {
    const A v = p.a * u;
    return v > p.b ? A(1) : times_sigmoid(A(1), v);
  }
};

template <>
struct ActivationFunction<Activation::kTanh> {
  template <typename A>
  FASTDENSE_HD static A value(A u, const ActivationParameters<A>&) {
    return tanh_of(u);
  }
  // 1 - tanh^2 = 4 s (1 - s) with s = sigmoid(2 u)
  template <typename A>
  FASTDENSE_HD static A slope(A u, const ActivationParameters<A>&) {
    const Sigmoid<A> s = sigmoid_of(u + u);
    return A(4) * (s.t * s.c);
  }
};

template <>
struct ActivationFunction<Activation::kSigmoid> {
  template <typename A>
  FASTDENSE_HD static A value(A u, const ActivationParameters<A>&) {
    return times_sigmoid(A(1), u);
  }
  template <typename A>
  FASTDENSE_HD static A slope(A u, const ActivationParameters<A>&) {
    const Sigmoid<A> s = sigmoid_of(u);
    return s.t * s.c;
  }
};

}  // namespace fastdense

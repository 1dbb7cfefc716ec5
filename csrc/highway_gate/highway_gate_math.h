// SPDX-License-Identifier: Apache-2.0
// The gate of a highway layer. Both halves of a projection [outer, 2, block] meet the input [outer, block]:
//
//   h = act(first half)    t = sigmoid(second half)    y = x + t * (h - x) = t * h + (1 - t) * x
//
// and for the gradient g of y:
//
//   dx = g * (1 - t)    dfirst = g * t * act'(first)    dsecond = g * (h - x) * t * (1 - t)
//
// 1 - t is computed without cancellation, so that a gate which is nearly open still learns.
// Srivastava, Greff, Schmidhuber: Highway networks. arXiv:1505.00387 (2015), equation 3.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/scalar.h"

namespace fastdense {

enum class HighwayActivation : int { kRelu, kTanh, kIdentity };

// t = sigmoid(v) and c = 1 - t
template <typename A>
struct HighwayGateValue {
  A t, c;
};

template <typename A>
FASTDENSE_HD HighwayGateValue<A> highway_sigmoid(A v) {
  const A small = std::exp(v < A(0) ? v : -v);  // in [0, 1]: never overflows
  const A large_share = A(1) / (A(1) + small), small_share = small * large_share;
  return v < A(0) ? HighwayGateValue<A>{small_share, large_share} : HighwayGateValue<A>{large_share, small_share};
}

template <typename A>
FASTDENSE_HD A highway_activate(HighwayActivation activation, A v) {
  if (activation == HighwayActivation::kRelu) return relu(v);
  return activation == HighwayActivation::kTanh ? std::tanh(v) : v;
}

// Derivative of the activation at v, where its value is h.
template <typename A>
FASTDENSE_HD A highway_slope(HighwayActivation activation, A v, A h) {
  if (activation == HighwayActivation::kRelu) return relu_passes(v) ? A(1) : A(0);
  return activation == HighwayActivation::kTanh ? A(1) - h * h : A(1);
}

template <typename A>
FASTDENSE_HD A highway_output(HighwayActivation activation, A x, A first, A second) {
  return mul_add(highway_sigmoid(second).t, highway_activate(activation, first) - x, x);
}

template <typename A>
struct HighwayGradients {
  A input, first, second;
};

template <typename A>
FASTDENSE_HD HighwayGradients<A> highway_gradients(HighwayActivation activation, A g, A x, A first, A second) {
  const HighwayGateValue<A> gate = highway_sigmoid(second);
  const A h = highway_activate(activation, first);
  return {g * gate.c, g * gate.t * highway_slope(activation, first, h), g * (h - x) * (gate.t * gate.c)};
}

// Functors over the elements of the input. `projected` is the place of an element's first half; the second half lies
// `block` further on. element(i, i + i / block * block) is element i.
template <typename T>
struct HighwayForward {
  const T* input;       // [outer, block]
  const T* projection;  // [outer, 2, block]
  T* output;            // [outer, block]
  int64_t block;
  HighwayActivation activation;

  FASTDENSE_HD void element(int64_t i, int64_t projected) const {
    output[i] = store<T>(
        highway_output(activation, load(input[i]), load(projection[projected]), load(projection[projected + block])));
  }
  FASTDENSE_HD void operator()(int64_t i) const { element(i, i + i / block * block); }
};

template <typename T>
struct HighwayBackward {
  const T* grad_output;  // [outer, block]
  const T* input;        // [outer, block]
  const T* projection;   // [outer, 2, block]
  T* grad_input;         // [outer, block]
  T* grad_projection;    // [outer, 2, block]
  int64_t block;
  HighwayActivation activation;

  FASTDENSE_HD void element(int64_t i, int64_t projected) const {
    const auto grads = highway_gradients(activation, load(grad_output[i]), load(input[i]), load(projection[projected]),
                                         load(projection[projected + block]));
    grad_input[i] = store<T>(grads.input);
    grad_projection[projected] = store<T>(grads.first);
    grad_projection[projected + block] = store<T>(grads.second);
  }
  FASTDENSE_HD void operator()(int64_t i) const { element(i, i + i / block * block); }
};

}  // namespace fastdense

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

#include <cstdint>

#include "core/exp_math.h"
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

struct HighwayTanh {
  template <typename A>
  FASTDENSE_HD static A value(A v) {
    return tanh_of(v);
  }
  template <typename A>
  FASTDENSE_HD static A slope(A, A h) {
    return A(1) - h * h;
  }
};

template <typename Activation, typename A>
FASTDENSE_HD A highway_output(A x, A first, A second) {
  return mul_add(times_sigmoid(A(1), second), Activation::value(first) - x, x);
}

template <typename A>
struct HighwayGradients {
  A input, first, second;
};

template <typename Activation, typename A>
FASTDENSE_HD HighwayGradients<A> highway_gradients(A g, A x, A first, A second) {
  const Sigmoid<A> gate = sigmoid_of(second);
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

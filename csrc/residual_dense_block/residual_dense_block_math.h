// SPDX-License-Identifier: Apache-2.0
// Scalar maths of the residual dense block (Zhang et al., "Residual Dense Network", 2018; Wang et al., "ESRGAN", 2018),
// shared by every device.
#pragma once

#include "core/scalar.h"

namespace fastdense {

// LeakyReLU; slope 0 is ReLU.  NaN stays NaN.
template <typename A>
FASTDENSE_HD A leaky_relu(A v, A slope) {
  const A below = slope == A(0) ? A(0) : v * slope;
  return v < A(0) ? below : v;
}

// Gradient in front of LeakyReLU from its output y, whose sign is that of the input, as slope >= 0.
template <typename A>
FASTDENSE_HD A leaky_relu_gradient(A g, A y, A slope) {
  return y > A(0) ? g : g * slope;
}

// The block's end: local fusion v, the block's input, and the input of the blocks around it.
template <typename A>
FASTDENSE_HD A residual_sum(A v, A scale, A input) {
  return v * scale + input;
}

}  // namespace fastdense

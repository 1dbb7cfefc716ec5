// SPDX-License-Identifier: Apache-2.0
// Activations of rows of numbers, compiled once for each instruction set.  No torch header.
#pragma once

#include <cstdint>

#include "core/activation_math.h"
#include "cpu/simd/dispatch.h"

namespace fastdense {

// v[n] becomes act(v), or act'(v).  leaky_relu reads `slope` [n] in place of its parameter: PReLU has one a channel.
template <typename A>
struct RowActivation {
  using Run = void (*)(const ActivationParameters<A>&, const A* slope, A* v, int64_t n);
  Run value = nullptr, derivative = nullptr;
};

FASTDENSE_EACH_ISA(template <typename A> RowActivation<A> row_activation(Activation);)

template <typename A>
inline RowActivation<A> row_activation(Isa isa, Activation activation) {
  return FASTDENSE_DISPATCH(isa, row_activation<A>(activation));
}

}  // namespace fastdense

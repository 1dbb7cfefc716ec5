// SPDX-License-Identifier: Apache-2.0
// CPU loops of the highway gate, compiled once for each instruction set. No torch header.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd/dispatch.h"
#include "highway_gate/highway_gate_math.h"

namespace fastdense {

// Both run over the elements [begin, end) of the input.
template <typename T, typename Activation>
struct HighwayLoops {
  void (*forward)(const HighwayForward<T, Activation>&, int64_t begin, int64_t end);
  void (*backward)(const HighwayBackward<T, Activation>&, int64_t begin, int64_t end);
};

FASTDENSE_EACH_ISA(template <typename T, typename Activation> HighwayLoops<T, Activation> highway_loops();)

template <typename T, typename Activation>
inline HighwayLoops<T, Activation> highway_loops(Isa isa) {
  return FASTDENSE_DISPATCH(isa, highway_loops<T, Activation>());
}

}  // namespace fastdense

// What is instantiated: macro(T, Activation) for all types and activations.
#define FASTDENSE_HIGHWAY_ACTIVATIONS(macro, T) macro(T, HighwayRelu) macro(T, HighwayTanh) macro(T, HighwayIdentity)
#define FASTDENSE_HIGHWAY_CASES(macro)           \
  FASTDENSE_HIGHWAY_ACTIVATIONS(macro, float)    \
  FASTDENSE_HIGHWAY_ACTIVATIONS(macro, double)   \
  FASTDENSE_HIGHWAY_ACTIVATIONS(macro, bfloat16) \
  FASTDENSE_HIGHWAY_ACTIVATIONS(macro, half)

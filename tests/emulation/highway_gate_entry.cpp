// SPDX-License-Identifier: Apache-2.0
// Calls the launchers of highway_gate_kernels.cu from Python.
#include "emulation.h"
#include "highway_gate/highway_gate_launch.h"

using namespace fastdense;  // NOLINT: a test

namespace {

// In the order of fastdense.ops.highway_gate.ACTIVATIONS.
template <typename Body>
int with_activation(int activation, const Body& body) {
  if (activation == 0) return body(HighwayRelu{});
  return activation == 1 ? body(HighwayTanh{}) : body(HighwayIdentity{});
}

template <typename T>
int forward(const void* input, const void* projection, void* output, int64_t block, int activation, int64_t count) {
  return with_activation(activation, [&](auto act) -> int {
    return launch_highway_gate<T, decltype(act)>(
        {static_cast<const T*>(input), static_cast<const T*>(projection), static_cast<T*>(output), block}, count,
        nullptr);
  });
}

template <typename T>
int backward(const void* grad, const void* input, const void* projection, void* grad_input, void* grad_projection,
             int64_t block, int activation, int64_t count) {
  return with_activation(activation, [&](auto act) -> int {
    return launch_highway_gate_backward<T, decltype(act)>(
        {static_cast<const T*>(grad), static_cast<const T*>(input), static_cast<const T*>(projection),
         static_cast<T*>(grad_input), static_cast<T*>(grad_projection), block},
        count, nullptr);
  });
}

}  // namespace

extern "C" {

void set_backwards(bool value) { emulation::backwards = value; }
int64_t launches() { return emulation::launches; }

#define FASTDENSE_ENTRIES(name, T)                                                                                    \
  int forward_##name(const void* x, const void* p, void* y, int64_t block, int activation, int64_t count) {           \
    return forward<T>(x, p, y, block, activation, count);                                                             \
  }                                                                                                                   \
  int backward_##name(const void* g, const void* x, const void* p, void* dx, void* dp, int64_t block, int activation, \
                      int64_t count) {                                                                                \
    return backward<T>(g, x, p, dx, dp, block, activation, count);                                                    \
  }
FASTDENSE_ENTRIES(float32, float)
FASTDENSE_ENTRIES(float64, double)
FASTDENSE_ENTRIES(bfloat16, bfloat16)
FASTDENSE_ENTRIES(float16, half)
}

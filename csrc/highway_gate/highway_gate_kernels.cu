// SPDX-License-Identifier: Apache-2.0
#include "cuda/for_each.h"
#include "highway_gate/highway_gate_launch.h"

namespace fastdense {

template <typename T, typename Activation>
cudaError_t launch_highway_gate(const HighwayForward<T, Activation>& gate, int64_t count, cudaStream_t stream) {
  return for_each(count, gate, stream);
}

template <typename T, typename Activation>
cudaError_t launch_highway_gate_backward(const HighwayBackward<T, Activation>& gate, int64_t count,
                                         cudaStream_t stream) {
  return for_each(count, gate, stream);
}

#define FASTDENSE_HIGHWAY_GATE(T, Activation)                                                                      \
  template cudaError_t launch_highway_gate<T, Activation>(const HighwayForward<T, Activation>&, int64_t,           \
                                                          cudaStream_t);                                           \
  template cudaError_t launch_highway_gate_backward<T, Activation>(const HighwayBackward<T, Activation>&, int64_t, \
                                                                   cudaStream_t);
#define FASTDENSE_HIGHWAY_GATES(T)       \
  FASTDENSE_HIGHWAY_GATE(T, HighwayRelu) \
  FASTDENSE_HIGHWAY_GATE(T, HighwayTanh) \
  FASTDENSE_HIGHWAY_GATE(T, HighwayIdentity)
FASTDENSE_HIGHWAY_GATES(float)
FASTDENSE_HIGHWAY_GATES(double)
FASTDENSE_HIGHWAY_GATES(bfloat16)
FASTDENSE_HIGHWAY_GATES(half)
#undef FASTDENSE_HIGHWAY_GATES
#undef FASTDENSE_HIGHWAY_GATE

}  // namespace fastdense

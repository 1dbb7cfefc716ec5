// SPDX-License-Identifier: Apache-2.0
#include "common/for_each.h"
#include "highway_gate/highway_gate_launch.h"

namespace fastdense {

template <typename T>
cudaError_t launch_highway_gate(const HighwayForward<T>& gate, int64_t count, cudaStream_t stream) {
  return for_each(count, gate, stream);
}

template <typename T>
cudaError_t launch_highway_gate_backward(const HighwayBackward<T>& gate, int64_t count, cudaStream_t stream) {
  return for_each(count, gate, stream);
}

#define FASTDENSE_HIGHWAY_GATE(T)                                                               \
  template cudaError_t launch_highway_gate<T>(const HighwayForward<T>&, int64_t, cudaStream_t); \
  template cudaError_t launch_highway_gate_backward<T>(const HighwayBackward<T>&, int64_t, cudaStream_t);
FASTDENSE_HIGHWAY_GATE(float)
FASTDENSE_HIGHWAY_GATE(double)
FASTDENSE_HIGHWAY_GATE(bfloat16)
FASTDENSE_HIGHWAY_GATE(half)
#undef FASTDENSE_HIGHWAY_GATE

}  // namespace fastdense

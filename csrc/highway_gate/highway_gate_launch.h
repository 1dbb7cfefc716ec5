// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of highway_gate and its backward: one thread an element.  No torch header.
#pragma once

#include "cuda/launch.h"
#include "highway_gate/highway_gate_math.h"

namespace fastdense {

// Both run over `count` elements of the input.
template <typename T, typename Activation>
cudaError_t launch_highway_gate(const HighwayForward<T, Activation>& gate, int64_t count, cudaStream_t stream);

template <typename T, typename Activation>
cudaError_t launch_highway_gate_backward(const HighwayBackward<T, Activation>& gate, int64_t count,
                                         cudaStream_t stream);

}  // namespace fastdense

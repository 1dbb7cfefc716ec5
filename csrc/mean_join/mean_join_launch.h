// SPDX-License-Identifier: Apache-2.0
// The CUDA kernel of mean_join: one thread an element.  No torch header.
#pragma once

#include "cuda/launch.h"
#include "mean_join/mean_join_math.h"

namespace fastdense {

template <typename T>
cudaError_t launch_mean_join(const MeanJoin<T>& join, int64_t count, cudaStream_t stream);

}  // namespace fastdense

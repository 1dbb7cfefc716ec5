// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of dual_path_merge and dual_path_split: one thread an element.  No torch header.
#pragma once

#include "cuda/launch.h"
#include "dual_path_merge/dual_path_merge_math.h"

namespace fastdense {

// `count` elements of the widest tensor; Functor is DualPathMerge<T> or DualPathSplit<T>.
template <typename Functor>
cudaError_t launch_path_elements(const Functor& functor, int64_t count, cudaStream_t stream);

}  // namespace fastdense

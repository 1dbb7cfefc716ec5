// SPDX-License-Identifier: Apache-2.0
#include "cuda/for_each.h"
#include "dual_path_merge/dual_path_merge_launch.h"

namespace fastdense {

template <typename Functor>
cudaError_t launch_path_elements(const Functor& functor, int64_t count, cudaStream_t stream) {
  return for_each(count, PathElement<Functor>{functor}, stream);
}

#define FASTDENSE_PATHS(T)                                                                   \
  template cudaError_t launch_path_elements(const DualPathMerge<T>&, int64_t, cudaStream_t); \
  template cudaError_t launch_path_elements(const DualPathSplit<T>&, int64_t, cudaStream_t);
FASTDENSE_PATHS(float)
FASTDENSE_PATHS(double)
FASTDENSE_PATHS(bfloat16)
FASTDENSE_PATHS(half)
#undef FASTDENSE_PATHS

}  // namespace fastdense

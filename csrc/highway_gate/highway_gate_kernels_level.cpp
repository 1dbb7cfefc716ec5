// SPDX-License-Identifier: Apache-2.0
#include "highway_gate/highway_gate_kernels.h"

namespace fastdense {

template <typename T, typename Activation>
HighwayLoops<T, Activation> highway_loops([[maybe_unused]] SimdLevel level) {
#if defined(__x86_64__)
  if (level >= SimdLevel::kAvx512) return avx512::highway_loops<T, Activation>();
  if (level == SimdLevel::kAvx2) return avx2::highway_loops<T, Activation>();
#endif
  return baseline::highway_loops<T, Activation>();
}

#define FASTDENSE_HIGHWAY_LOOPS(T, Activation) \
  template HighwayLoops<T, Activation> highway_loops<T, Activation>(SimdLevel);
FASTDENSE_HIGHWAY_CASES(FASTDENSE_HIGHWAY_LOOPS)
#undef FASTDENSE_HIGHWAY_LOOPS

}  // namespace fastdense

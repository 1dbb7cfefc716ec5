// SPDX-License-Identifier: Apache-2.0
// Calls the launchers of dual_path_merge_kernels.cu from Python.
#include "dual_path_merge/dual_path_merge_launch.h"
#include "emulation.h"

using namespace fastdense;  // NOLINT: a test

extern "C" {

void set_backwards(bool value) { emulation::backwards = value; }
int64_t launches() { return emulation::launches; }

#define FASTDENSE_ENTRIES(name, T)                                                                                   \
  int merge_##name(const void* x, const void* z, void* y, int64_t r, int64_t d, int64_t k, int64_t count) {          \
    const DualPathMerge<T> merge{static_cast<const T*>(x), static_cast<const T*>(z), static_cast<T*>(y), {r, d, k}}; \
    return launch_path_elements(merge, count, nullptr);                                                              \
  }                                                                                                                  \
  int split_##name(const void* g, void* x, void* z, int64_t r, int64_t d, int64_t k, int64_t count) {                \
    const DualPathSplit<T> split{static_cast<const T*>(g), static_cast<T*>(x), static_cast<T*>(z), {r, d, k}};       \
    return launch_path_elements(split, count, nullptr);                                                              \
  }
FASTDENSE_ENTRIES(float32, float)
FASTDENSE_ENTRIES(float64, double)
FASTDENSE_ENTRIES(bfloat16, bfloat16)
FASTDENSE_ENTRIES(float16, half)
}

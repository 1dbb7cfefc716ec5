// SPDX-License-Identifier: Apache-2.0
// Calls the launcher of mean_join_kernels.cu from Python.
#include "emulation.h"
#include "mean_join/mean_join_launch.h"

using namespace fastdense;  // NOLINT: a test

namespace {

template <typename T>
int join(const void* const* inputs, int joined, void* output, int64_t count) {
  MeanJoin<T> join{{}, static_cast<T*>(output), joined};
  for (int j = 0; j < joined; ++j) join.inputs[j] = static_cast<const T*>(inputs[j]);
  return launch_mean_join(join, count, nullptr);
}

}  // namespace

extern "C" {

void set_backwards(bool value) { emulation::backwards = value; }
int64_t launches() { return emulation::launches; }

#define FASTDENSE_ENTRY(name, T)                                                        \
  int join_##name(const void* const* inputs, int joined, void* output, int64_t count) { \
    return join<T>(inputs, joined, output, count);                                      \
  }
FASTDENSE_ENTRY(float32, float)
FASTDENSE_ENTRY(float64, double)
FASTDENSE_ENTRY(bfloat16, bfloat16)
FASTDENSE_ENTRY(float16, half)
}

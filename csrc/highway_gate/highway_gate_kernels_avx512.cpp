// SPDX-License-Identifier: Apache-2.0
#include "highway_gate/highway_gate_kernels.h"

#if defined(__x86_64__)
#define FASTDENSE_TARGET avx512
#define FASTDENSE_TARGET_AVX512
#include "common/target.h"

#include "highway_gate/highway_gate_kernels_impl.h"

#include "common/target_end.h"
#endif

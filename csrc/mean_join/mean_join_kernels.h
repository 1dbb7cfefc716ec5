// SPDX-License-Identifier: Apache-2.0
// CPU loops of mean_join, compiled once for each instruction set. No torch header.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd/dispatch.h"
#include "mean_join/mean_join_math.h"

namespace fastdense {

// Runs over the elements [begin, end).
template <typename T>
using MeanJoinLoop = void (*)(const MeanJoin<T>&, int64_t begin, int64_t end);

// The argument names the type only.
FASTDENSE_EACH_ISA(template <typename T> MeanJoinLoop<T> mean_join_loop();)

template <typename T>
inline MeanJoinLoop<T> mean_join_loop(const MeanJoin<T>&, Isa isa) {
  return FASTDENSE_DISPATCH(isa, mean_join_loop<T>());
}

}  // namespace fastdense

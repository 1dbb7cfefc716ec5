// SPDX-License-Identifier: Apache-2.0
// Which of our storage types stands for a type of torch: they have the same layout, and the kernels know ours only.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "core/scalar.h"

namespace fastdense {

template <typename T>
struct Storage {
  using type = T;
};
template <>
struct Storage<c10::BFloat16> {
  using type = bfloat16;
};
template <>
struct Storage<c10::Half> {
  using type = half;
};

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
// The storage type (core/scalar.h) that stands for a type of torch; both have the same bits.
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

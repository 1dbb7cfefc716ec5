// SPDX-License-Identifier: Apache-2.0
// AllocationTape: every tensor memory that a thread takes or gives back, in order.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdense {

void bind_allocation_tape(pybind11::module_& m);

}  // namespace fastdense

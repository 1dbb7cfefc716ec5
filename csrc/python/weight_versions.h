// SPDX-License-Identifier: Apache-2.0
// WeightVersions: what tensors were, and whether anything has been written to them since.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdense {

void bind_weight_versions(pybind11::module_& m);

}  // namespace fastdense

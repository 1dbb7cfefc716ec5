// SPDX-License-Identifier: Apache-2.0
// Fingerprint: what modules and the code that they run looked like, and whether they still do.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdense {

void bind_fingerprint(pybind11::module_& m);

}  // namespace fastdense

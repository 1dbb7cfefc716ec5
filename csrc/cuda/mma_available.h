// SPDX-License-Identifier: Apache-2.0
// Whether the code that a device runs was compiled with tensor cores.  No torch header.
#pragma once

#include "cuda/launch.h"

namespace fastdense {

// Of the current device, by what its driver chose of this build: an 8.x that only finds PTX for 7.5 runs kernels
// without their tensor-core parts.
cudaError_t mma_available(bool* has);

}  // namespace fastdense

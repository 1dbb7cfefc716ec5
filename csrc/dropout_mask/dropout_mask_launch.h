// SPDX-License-Identifier: Apache-2.0
// The CUDA kernel of dropout_mask: one thread a block of four elements.  No torch header.
#pragma once

#include "core/dropout_math.h"
#include "cuda/launch.h"

namespace fastdense {

cudaError_t launch_dropout_mask(const DropoutMask& mask, cudaStream_t stream);

}  // namespace fastdense

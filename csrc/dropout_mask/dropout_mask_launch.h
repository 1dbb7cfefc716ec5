// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/launch.h"
#include "dropout_mask/dropout_mask_math.h"

namespace fastdense {

cudaError_t launch_dropout_mask(const DropoutMask& mask, cudaStream_t stream);

}  // namespace fastdense

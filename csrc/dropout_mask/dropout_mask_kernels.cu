// SPDX-License-Identifier: Apache-2.0
#include "cuda/for_each.h"
#include "dropout_mask/dropout_mask_launch.h"

namespace fastdense {

cudaError_t launch_dropout_mask(const DropoutMask& mask, cudaStream_t stream) {
  return for_each(mask.blocks(), mask, stream);
}

}  // namespace fastdense

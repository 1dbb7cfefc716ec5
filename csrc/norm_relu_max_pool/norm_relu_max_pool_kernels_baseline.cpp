// SPDX-License-Identifier: Apache-2.0
#include "norm_relu_max_pool/norm_relu_max_pool_kernels.h"

#define FASTDENSE_TARGET baseline
#include "common/target.h"

#include "norm_relu_max_pool/norm_relu_max_pool_kernels_impl.h"

#include "common/target_end.h"

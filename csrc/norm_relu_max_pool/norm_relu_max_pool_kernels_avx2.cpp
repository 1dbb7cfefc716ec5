// SPDX-License-Identifier: Apache-2.0
#include "norm_relu_max_pool/norm_relu_max_pool_kernels.h"

#if defined(__x86_64__)
#define FASTDENSE_TARGET avx2
#define FASTDENSE_TARGET_AVX2
#include "common/target.h"

#include "norm_relu_max_pool/norm_relu_max_pool_kernels_impl.h"

#include "common/target_end.h"
#endif

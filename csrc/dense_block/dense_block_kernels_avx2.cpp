// SPDX-License-Identifier: Apache-2.0
#include "common/batch_norm_math.h"
#include "dense_block/dense_block_kernels.h"
#include "dropout_mask/dropout_mask_math.h"

#if defined(__x86_64__)
#define FASTDENSE_TARGET avx2
#define FASTDENSE_TARGET_AVX2
#include "common/target.h"

#include "common/vec.h"

#include "dense_block/dense_block_kernels_impl.h"

#include "common/target_end.h"
#endif

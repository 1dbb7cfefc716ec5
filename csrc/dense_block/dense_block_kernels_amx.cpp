// SPDX-License-Identifier: Apache-2.0
#include "common/batch_norm_math.h"
#include "dense_block/dense_block_kernels.h"
#include "dropout_mask/dropout_mask_math.h"

#ifdef FASTDENSE_HAS_AMX
#define FASTDENSE_TARGET amx
#define FASTDENSE_TARGET_AMX
#define FASTDENSE_TARGET_AVX512
#define FASTDENSE_TARGET_PAIRS
#include "common/target.h"

#include "common/vec.h"

#include "dense_block/dense_block_kernels_impl.h"

#include "common/target_end.h"
#endif

// SPDX-License-Identifier: Apache-2.0
#include "common/batch_norm_math.h"
#include "common/row_kernels.h"

#ifdef FASTDENSE_HAS_AVX512_BF16
#define FASTDENSE_TARGET avx512_bf16
#define FASTDENSE_TARGET_AVX512
#define FASTDENSE_TARGET_PAIRS
#include "common/target.h"

#include "common/vec.h"

#include "common/row_kernels_impl.h"

#include "common/target_end.h"
#endif

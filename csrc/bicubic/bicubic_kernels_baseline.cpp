// SPDX-License-Identifier: Apache-2.0
#include "bicubic/bicubic_kernels.h"

#define FASTDENSE_TARGET baseline
#include "common/target.h"

#include "common/vec.h"

#include "bicubic/bicubic_kernels_impl.h"

#include "common/target_end.h"

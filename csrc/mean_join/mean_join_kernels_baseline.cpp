// SPDX-License-Identifier: Apache-2.0
#include "mean_join/mean_join_kernels.h"

#define FASTDENSE_TARGET baseline
#include "common/target.h"

#include "mean_join/mean_join_kernels_impl.h"

#include "common/target_end.h"

// SPDX-License-Identifier: Apache-2.0
#include "highway_gate/highway_gate_kernels.h"

#define FASTDENSE_TARGET baseline
#include "common/target.h"

#include "highway_gate/highway_gate_kernels_impl.h"

#include "common/target_end.h"

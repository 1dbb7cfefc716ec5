// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "dropout_mask/dropout_mask.h"

namespace fastdense {
namespace {

at::Tensor dropout_mask_cpu(const at::Tensor& seed, int64_t layer, int64_t rows, int64_t channels, double drop_rate) {
  constexpr int64_t kGrain = 4096;
  const at::Tensor mask = dropout_mask_prepare(seed, layer, rows, channels, drop_rate);
  if (!has_values(mask)) return mask;
  const DropoutMask fill = dropout_mask_params(seed, mask, layer, drop_rate);
  at::parallel_for(0, fill.blocks(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) fill(block);
  });
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) { m.impl("dropout_mask", &dropout_mask_cpu); }
TORCH_LIBRARY_IMPL(fastdense_meta, Meta, m) { m.impl("dropout_mask", &dropout_mask_cpu); }

}  // namespace fastdense

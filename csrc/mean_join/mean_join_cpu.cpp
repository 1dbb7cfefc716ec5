// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "mean_join/mean_join.h"
#include "mean_join/mean_join_kernels.h"

namespace fastdense {
namespace {

at::Tensor mean_join_cpu(at::TensorList inputs) {
  return mean_join(inputs, [](const auto& functor, int64_t count) {
    constexpr int64_t kGrain = 1 << 14;
    const auto loop = mean_join_loop(functor, current_isa());
    at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) { loop(functor, begin, end); });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) { m.impl("mean_join", &mean_join_cpu); }
TORCH_LIBRARY_IMPL(fastdense_meta, Meta, m) { m.impl("mean_join", &mean_join_cpu); }

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "dual_path_merge/dual_path_merge.h"

namespace fastdense {
namespace {

const auto run_on_cpu = [](const auto& functor, int64_t count) {
  constexpr int64_t kGrain = 1 << 15;
  at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) { for_each_path_element(functor, begin, end); });
};

at::Tensor merge(const at::Tensor& input, const at::Tensor& features, int64_t residual_channels) {
  return dual_path_merge(input, features, residual_channels, run_on_cpu);
}

std::tuple<at::Tensor, at::Tensor> split(const at::Tensor& input, int64_t channels, int64_t residual_channels) {
  return dual_path_split(input, channels, residual_channels, run_on_cpu);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) {
  m.impl("dual_path_merge", &merge);
  m.impl("dual_path_split", &split);
}
TORCH_LIBRARY_IMPL(fastdense_meta, Meta, m) {
  m.impl("dual_path_merge", &merge);
  m.impl("dual_path_split", &split);
}

}  // namespace fastdense

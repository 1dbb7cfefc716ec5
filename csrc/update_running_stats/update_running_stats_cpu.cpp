// SPDX-License-Identifier: Apache-2.0
// update_running_stats_: running mean and variance of many norms from the batch statistics of one block, once a step.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "core/batch_norm_math.h"
#include "update_running_stats/update_running_stats.h"

namespace fastdense {
namespace {

constexpr const char* kOp = "update_running_stats_";

template <typename T>
void update(const at::Tensor& running, const at::Tensor& batch, int64_t offset, double factor, double unbias) {
  T* r = running.mutable_data_ptr<T>();
  AT_DISPATCH_FLOATING_TYPES(batch.scalar_type(), kOp, [&] {
    const scalar_t* b = batch.const_data_ptr<scalar_t>() + offset;
    const int64_t stride = running.stride(0);
    for (int64_t j = 0, n = running.numel(); j < n; ++j)
      r[j * stride] = T(update_running<double>(double(r[j * stride]), double(b[j]) * unbias, factor));
  });
}

void update_running_stats_cpu(at::TensorList running_mean, at::TensorList running_var, at::TensorList batches,
                              const at::Tensor& mean, const at::Tensor& var, at::IntArrayRef offsets,
                              at::ArrayRef<double> momentum, int64_t count,
                              const std::optional<at::Tensor>& total_count) {
  run_update_running_stats(
      {running_mean, running_var, batches, mean, var, offsets, momentum, count, total_count},
      [](const RunningStatsArgs& a) {
        const double count = a.total_count ? a.total_count->item<double>() : double(a.count);
        TORCH_CHECK_VALUE(count == 0 || count > 1, kOp, ": expected total_count to be more than 1, got ", count);
        for (size_t i = 0; i < a.running_mean.size(); ++i) {
          int64_t& tracked = *a.batches[i].mutable_data_ptr<int64_t>();
          ++tracked;
          if (count == 0) continue;  // an empty batch has no statistics
          const double factor = running_factor(a.momentum[i], tracked);
          AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, a.running_mean[i].scalar_type(), kOp, [&] {
            update<scalar_t>(a.running_mean[i], a.mean, a.offsets[i], factor, 1.0);
            update<scalar_t>(a.running_var[i], a.var, a.offsets[i], factor, unbiased_factor(count));
          });
        }
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) { m.impl("update_running_stats_", &update_running_stats_cpu); }
TORCH_LIBRARY_IMPL(fastdense_meta, Meta, m) { m.impl("update_running_stats_", &update_running_stats_cpu); }

}  // namespace fastdense

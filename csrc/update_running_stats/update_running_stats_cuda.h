// SPDX-License-Identifier: Apache-2.0
// update_running_stats_ on a CUDA device: nothing is read back, so a step can be captured in a CUDA graph.
#pragma once

#include <ATen/Dispatch.h>

#include <algorithm>

#include "core/batch_norm_math.h"
#include "core/storage.h"
#include "update_running_stats/update_running_stats.h"
#include "update_running_stats/update_running_stats_launch.h"

namespace fastdense {

// Moves the norms whose running statistics have the type T.
template <typename T, typename A>
void launch_running_stats_of(const RunningStatsArgs& a, at::ScalarType type, cudaStream_t stream) {
  RunningStatsParams<T, A> params{};
  params.mean = a.mean.const_data_ptr<A>();
  params.var = a.var.const_data_ptr<A>();
  params.batch_count = double(a.count);
  params.total_count = a.total_count ? a.total_count->const_data_ptr<double>() : nullptr;
  const auto flush = [&] {
    const cudaError_t error = launch_running_stats(params, stream);
    TORCH_CHECK(error == cudaSuccess, "update_running_stats_: CUDA kernel launch failed: ", cudaGetErrorString(error));
    params.count = 0;
  };
  for (size_t i = 0; i < a.running_mean.size(); ++i) {
    const at::Tensor &mean = a.running_mean[i], &var = a.running_var[i];
    if (mean.scalar_type() != type) continue;
    params.norms[params.count++] = {static_cast<T*>(mean.mutable_data_ptr()),
                                    static_cast<T*>(var.mutable_data_ptr()),
                                    mean.stride(0),
                                    var.stride(0),
                                    a.batches[i].mutable_data_ptr<int64_t>(),
                                    mean.numel(),
                                    a.offsets[i],
                                    a.momentum[i]};
    if (params.count == kMostRunningNorms) flush();
  }
  flush();
}

inline void update_running_stats_on(const RunningStatsArgs& args, cudaStream_t stream) {
  run_update_running_stats(args, [&](const RunningStatsArgs& a) {
    for (const at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf})
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "update_running_stats_", [&] {
        using T = typename Storage<scalar_t>::type;
        if (a.mean.scalar_type() == at::kDouble)
          launch_running_stats_of<T, double>(a, type, stream);
        else
          launch_running_stats_of<T, float>(a, type, stream);
      });
  });
}

}  // namespace fastdense

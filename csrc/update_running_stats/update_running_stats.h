// SPDX-License-Identifier: Apache-2.0
// Front half of update_running_stats_, shared by the CPU and the CUDA file: checks, when to do nothing, versions.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/graph_task.h>

#include <optional>

#include "core/checks.h"

namespace fastdense {

// The arguments of update_running_stats_; norm i reads mean[offsets[i] ...], and a negative momentum means the
// cumulative average 1 / num_batches_tracked.
struct RunningStatsArgs {
  at::TensorList running_mean, running_var, batches;
  at::Tensor mean, var;  // [S]
  at::IntArrayRef offsets;
  at::ArrayRef<double> momentum;
  int64_t count;
  std::optional<at::Tensor> total_count;  // [1], float64; instead of `count`
};

inline void check_running_vector(const at::Tensor& t, const char* arg) {
  constexpr const char* kOp = "update_running_stats_";
  check_rank(kOp, arg, t, 1);
  TORCH_CHECK_VALUE(t.numel() < 2 || t.stride(0) != 0, kOp, ": expected ", arg,
                    " to have memory of its own for every channel, got an expanded tensor");
}

inline void check_running_stats(const RunningStatsArgs& args) {
  constexpr const char* kOp = "update_running_stats_";
  const auto& [running_mean, running_var, batches, mean, var, offsets, momentum, count, total_count] = args;
  const size_t norms = running_mean.size();
  check_entries(kOp, "running_var", running_var.size(), int64_t(norms));
  check_entries(kOp, "num_batches_tracked", batches.size(), int64_t(norms));
  check_entries(kOp, "offsets", offsets.size(), int64_t(norms));
  check_entries(kOp, "momentum", momentum.size(), int64_t(norms));
  check_at_least(kOp, "count", count, 0);
  TORCH_CHECK_VALUE(count != 1 || total_count, kOp, ": expected count to be more than 1 value per channel, got 1");
  check_rank(kOp, "mean", mean, 1);
  TORCH_CHECK_TYPE(mean.scalar_type() == at::kFloat || mean.scalar_type() == at::kDouble, kOp,
                   ": expected mean to be float32 or float64, got ", dtype_name(mean.scalar_type()));
  check_like(kOp, "var", var, "mean", mean);
  check_shape(kOp, "var", var, mean.sizes());
  if (total_count) {
    check_dtype(kOp, "total_count", *total_count, at::kDouble);
    check_same_device(kOp, "total_count", *total_count, "mean", mean);
    check_shape(kOp, "total_count", *total_count, {1});
  }
  for (size_t i = 0; i < norms; ++i) {
    check_floating(kOp, "running_mean", running_mean[i]);
    check_same_device(kOp, "running_mean", running_mean[i], "mean", mean);
    check_running_vector(running_mean[i], "running_mean");
    check_running_vector(running_var[i], "running_var");
    check_like(kOp, "running_var", running_var[i], "running_mean", running_mean[i]);
    check_shape(kOp, "running_var", running_var[i], running_mean[i].sizes());
    check_dtype(kOp, "num_batches_tracked", batches[i], at::kLong);
    check_same_device(kOp, "num_batches_tracked", batches[i], "mean", mean);
    TORCH_CHECK_VALUE(batches[i].numel() == 1, kOp, ": expected num_batches_tracked to be one number, got shape ",
                      batches[i].sizes());
    check_at_least(kOp, "offsets", offsets[i], 0);
    check_at_most(kOp, "offsets", offsets[i], mean.numel() - running_mean[i].numel());
    check_finite(kOp, "momentum", momentum[i]);
  }
}

// update(args) unless it is a checkpoint that runs the forward pass again inside a backward pass: the step has been
// counted.  mean and var are made contiguous.
template <typename Update>
void run_update_running_stats(RunningStatsArgs args, const Update& update) {
  check_running_stats(args);
  if (args.mean.is_meta()) return;
  if (torch::autograd::get_current_graph_task_id() != -1) return;
  args.mean = args.mean.contiguous();
  args.var = args.var.contiguous();
  update(args);
  for (const at::TensorList list : {args.running_mean, args.running_var, args.batches})
    for (const at::Tensor& t : list)
      if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

}  // namespace fastdense

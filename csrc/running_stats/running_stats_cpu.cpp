// SPDX-License-Identifier: Apache-2.0
// update_running_stats_: running mean and variance of many norms from the batch statistics of one block, once a step.
// Norm i reads mean[offsets[i] ...]; a negative momentum means the cumulative average 1 / num_batches_tracked.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "common/batch_norm_math.h"
#include "common/checks.h"

namespace fastdense {
namespace {

constexpr const char* kOp = "update_running_stats_";

void check_vector(const at::Tensor& t, const char* arg) {
  check_rank(kOp, arg, t, 1);
  TORCH_CHECK_VALUE(t.numel() < 2 || t.stride(0) != 0, kOp, ": expected ", arg,
                    " to have memory of its own for every channel, got an expanded tensor");
}

void check(at::TensorList running_mean, at::TensorList running_var, at::TensorList batches, const at::Tensor& mean,
           const at::Tensor& var, at::IntArrayRef offsets, at::ArrayRef<double> momentum, int64_t count) {
  const size_t norms = running_mean.size();
  TORCH_CHECK_VALUE(
      running_var.size() == norms && batches.size() == norms && offsets.size() == norms && momentum.size() == norms,
      kOp, ": expected all lists to have ", norms, " entries, got ", running_var.size(), ", ", batches.size(), ", ",
      offsets.size(), " and ", momentum.size());
  TORCH_CHECK_VALUE(count > 1, kOp, ": expected count to be more than 1 value per channel, got ", count);
  check_rank(kOp, "mean", mean, 1);
  TORCH_CHECK_TYPE(mean.scalar_type() == at::kFloat || mean.scalar_type() == at::kDouble, kOp,
                   ": expected mean to be float32 or float64, got ", dtype_name(mean.scalar_type()));
  check_same_dtype(kOp, "var", var, "mean", mean);
  check_shape(kOp, "var", var, mean.sizes());
  for (size_t i = 0; i < norms; ++i) {
    check_floating(kOp, "running_mean", running_mean[i]);
    check_vector(running_mean[i], "running_mean");
    check_vector(running_var[i], "running_var");
    check_same_dtype(kOp, "running_var", running_var[i], "running_mean", running_mean[i]);
    check_shape(kOp, "running_var", running_var[i], running_mean[i].sizes());
    check_dtype(kOp, "num_batches_tracked", batches[i], at::kLong);
    TORCH_CHECK_VALUE(batches[i].numel() == 1, kOp, ": expected num_batches_tracked to be one number, got shape ",
                      batches[i].sizes());
    for (const at::Tensor& t : {running_mean[i], running_var[i], batches[i], var})
      check_same_device(kOp, "all tensors", t, "mean", mean);
    check_at_least(kOp, "offsets", offsets[i], 0);
    check_at_most(kOp, "offsets + channels", offsets[i] + running_mean[i].numel(), mean.numel());
  }
}

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
                              at::ArrayRef<double> momentum, int64_t count) {
  check(running_mean, running_var, batches, mean, var, offsets, momentum, count);
  // Inside a backward pass this is an outer activation checkpoint running the forward again: the step has been counted.
  if (torch::autograd::get_current_graph_task_id() != -1) return;
  const at::Tensor means = mean.contiguous(), variances = var.contiguous();
  for (size_t i = 0; i < running_mean.size(); ++i) {
    int64_t& tracked = *batches[i].mutable_data_ptr<int64_t>();
    ++tracked;
    const double factor = momentum[i] < 0 ? 1.0 / double(tracked) : momentum[i];
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, running_mean[i].scalar_type(), kOp, [&] {
      update<scalar_t>(running_mean[i], means, offsets[i], factor, 1.0);
      update<scalar_t>(running_var[i], variances, offsets[i], factor, unbiased_factor(double(count)));
    });
    for (const at::Tensor& t : {running_mean[i], running_var[i], batches[i]})
      if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) { m.impl("update_running_stats_", &update_running_stats_cpu); }

}  // namespace fastdense

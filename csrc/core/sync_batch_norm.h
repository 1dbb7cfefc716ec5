// SPDX-License-Identifier: Apache-2.0
// Batch statistics over the values of several processes, as nn.SyncBatchNorm takes them.  Only those of new channels
// are communicated: the blocks take statistics once per channel, and defer the corrections of gradients until all
// consumers of a channel are done (batch_norm_math.h).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace fastdense {

// Raises unless it names a group of torch.distributed, or none.
void check_process_group(const char* op, std::string_view group);

class SyncBatchNorm {
 public:
  // The name of a group of torch.distributed; empty: this process alone, and everything stays as it is.
  explicit SyncBatchNorm(std::string group = {}) : group_(std::move(group)) {}

  bool enabled() const { return !group_.empty(); }

  // mean and biased variance [n] of `count` values of this process become those of all processes' values.
  template <typename A>
  void moments(A* mean, A* var, int64_t n, int64_t count, const at::TensorOptions& options) const {
    if (!enabled()) return;
    const auto numbers = options.dtype(std::is_same_v<A, double> ? at::kDouble : at::kFloat);
    moments(at::from_blob(mean, {n}, numbers), at::from_blob(var, {n}, numbers), count);
  }

  // Means over `count` values of this process become means over all processes' values.
  void means(const at::Tensor& terms, int64_t count) const {
    if (enabled()) terms.copy_(mean_of_all(terms, double(count), count));
  }
  // The same of entries [first, first + n) of a dimension.
  void means(const at::Tensor& terms, int64_t dim, int64_t first, int64_t n, int64_t count) const {
    if (enabled()) means(terms.narrow(dim, first, n), count);
  }

  // Sums over `count` values of this process become so many times the mean over all processes' values.
  void sums(const at::Tensor& terms, int64_t count) const {
    if (enabled()) terms.copy_(mean_of_all(terms, 1.0, count).mul_(double(count)));
  }

 private:
  void moments(const at::Tensor& mean, const at::Tensor& var, int64_t count) const;
  // Sum of weight * terms over the processes, by the sum of counts; float64.
  at::Tensor mean_of_all(const at::Tensor& terms, double weight, int64_t count) const;

  const std::string group_;
};

}  // namespace fastdense

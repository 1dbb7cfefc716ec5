// SPDX-License-Identifier: Apache-2.0
#include "core/sync_batch_norm.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include <vector>

namespace fastdense {

void check_process_group(const char* op, std::string_view group) {
  if (group.empty()) return;
  try {
    c10d::resolve_process_group(std::string(group));
  } catch (const std::exception&) {
    TORCH_CHECK_VALUE(false, op, ": expected process_group to name a group of torch.distributed, got ", group);
  }
}

// Every process adds the same numbers in the same order: the results are bit-identical in all of them.
void SyncBatchNorm::moments(const at::Tensor& mean, const at::Tensor& var, int64_t count) const {
  const int64_t n = mean.numel();
  const auto group = c10d::resolve_process_group(group_);
  const auto numbers = mean.options().dtype(at::kDouble);
  std::vector<at::Tensor> mine{at::zeros({2 * n + 1}, numbers)};
  if (count > 0) mine[0].copy_(at::cat({mean, var, at::full({1}, double(count), numbers)}));
  const at::Tensor gathered = at::empty({group->getSize(), 2 * n + 1}, numbers);
  std::vector<std::vector<at::Tensor>> all{gathered.unbind()};
  group->allgather(all, mine)->wait();
  const at::Tensor means = gathered.narrow(1, 0, n), vars = gathered.narrow(1, n, n);
  const at::Tensor counts = gathered.narrow(1, 2 * n, 1), total = counts.sum();
  // On a host nothing is waited for.  All processes see the same total, so none is left alone.
  TORCH_CHECK_VALUE(!total.is_cpu() || total.item<double>() > 1,
                    "fastdense: expected more than 1 value per channel in all processes together when training, got ",
                    total.item<double>());
  const at::Tensor share = counts / total;
  const at::Tensor centre = (share * means).sum(0);
  mean.copy_(centre);
  var.copy_((share * (vars + (means - centre).square())).sum(0));
}

at::Tensor SyncBatchNorm::mean_of_all(const at::Tensor& terms, double weight, int64_t count) const {
  const int64_t n = terms.numel();
  const auto group = c10d::resolve_process_group(group_);
  std::vector<at::Tensor> sums{at::zeros({n + 1}, terms.options().dtype(at::kDouble))};
  if (count > 0) {
    sums[0].narrow(0, 0, n).copy_(terms.reshape(-1)).mul_(weight);
    sums[0].narrow(0, n, 1).fill_(double(count));
  }
  group->allreduce(sums)->wait();
  return (sums[0].narrow(0, 0, n) / sums[0].narrow(0, n, 1)).view(terms.sizes());
}

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
// Large results on the CPU are fresh memory, whose first touch costs one page fault for every 4 KiB, often more than
// the arithmetic.  Where Linux gives huge pages on request, this requests them; other tensors are returned as they are.
#pragma once

#include <ATen/core/Tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace fastdense {

inline at::Tensor with_huge_pages(at::Tensor tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  if (tensor.device().is_cpu() && tensor.nbytes() >= 2 * kPage) {
    const auto start = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    const uintptr_t first = (start + kPage - 1) / kPage * kPage, last = (start + tensor.nbytes()) / kPage * kPage;
    // Only a hint: a refusal changes nothing.
    if (last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return tensor;
}

}  // namespace fastdense

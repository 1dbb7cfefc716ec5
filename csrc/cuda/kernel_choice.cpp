// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernel_choice.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace fastdense {
namespace {

constexpr CudaKernels kChoices[] = {CudaKernels::kAuto, CudaKernels::kFused, CudaKernels::kLibrary};
constexpr const char* kAllowed = "auto, fused or library";

std::optional<CudaKernels> parse(std::string_view name) {
  for (const CudaKernels kernels : kChoices) {
    if (name == cuda_kernels_name(kernels)) return kernels;
  }
  return std::nullopt;
}

CudaKernels initial_choice() {
  const char* name = std::getenv("FASTDENSE_CUDA_KERNELS");
  if (name == nullptr || *name == '\0') return CudaKernels::kAuto;
  const std::optional<CudaKernels> wanted = parse(name);
  if (!wanted) std::fprintf(stderr, "fastdense: ignoring FASTDENSE_CUDA_KERNELS=%s, expected %s\n", name, kAllowed);
  return wanted.value_or(CudaKernels::kAuto);
}

std::atomic<CudaKernels>& current_choice() {
  static std::atomic<CudaKernels> choice{initial_choice()};
  return choice;
}

}  // namespace

CudaKernels cuda_kernels() { return current_choice().load(std::memory_order_relaxed); }

const char* cuda_kernels_name(CudaKernels kernels) {
  constexpr const char* kNames[] = {"auto", "fused", "library"};
  return kNames[static_cast<int>(kernels)];
}

void set_cuda_kernels(const char* name) {
  const std::optional<CudaKernels> kernels = parse(name);
  if (!kernels) {
    throw std::invalid_argument(std::string("set_cuda_kernels: expected name to be ") + kAllowed + ", got " + name);
  }
  current_choice().store(*kernels, std::memory_order_relaxed);
}

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
// Forward of the dual path stage on the CPU.
#include <torch/library.h>

#include "dual_path/dual_path_forward_cpu.h"
#include "dual_path/dual_path_ops.h"

namespace fastdense {
namespace {

struct ForwardEngine {
  using Guard = c10::Device;  // nothing to guard
  template <typename T>
  static void forward(const DualPathArgs& args, DualPathKeep keep, const at::Tensor& input, const DualPathOutputs& o) {
    DualPathForward<T>(args, keep, o, input.scalar_type()).run(input);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) { m.impl("dual_path_stage", &dual_path_stage<ForwardEngine>); }
TORCH_LIBRARY_IMPL(fastdense_meta, Meta, m) { m.impl("dual_path_stage", &dual_path_stage<ForwardEngine>); }

}  // namespace fastdense

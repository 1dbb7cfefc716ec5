// SPDX-License-Identifier: Apache-2.0
// The CUDA block ops with their kernels emulated, as ops of another namespace on CPU tensors.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <memory>

#include "dense_block/dense_block_cuda.h"
#include "dual_path/dual_path_cuda.h"
#include "emulation.h"
#include "norm_relu_max_pool/norm_relu_max_pool_cuda.h"
#include "residual_dense_block/residual_dense_block_cuda.h"
#include "update_running_stats/update_running_stats_cuda.h"

namespace fastdense {
namespace {

CudaContext context{nullptr, 0, 0, true, false, false, emulation::kMostShared};

struct EmulatedDenseBlock {
  using Guard = c10::Device;  // nothing to guard
  template <typename T>
  static void forward(const DenseBlockArgs& args, const at::Tensor& input, const std::optional<at::Tensor>& seed,
                      const DenseBlockOutputs& o) {
    dense_block_forward_cuda<T>(args, input, seed, o, context);
  }
  template <typename T>
  static std::vector<at::Tensor> backward(const DenseBlockArgs& args, const DenseBlockSaved& saved,
                                          const at::Tensor& grad_output, const std::optional<at::Tensor>& seed,
                                          const std::vector<bool>& needs, at::TensorList weights) {
    return dense_block_backward_cuda<T>(args, saved, grad_output, seed, needs, weights, context);
  }
};

struct EmulatedDualPath {
  using Guard = c10::Device;  // nothing to guard
  template <typename T>
  static void forward(const DualPathArgs& args, DualPathKeep keep, const at::Tensor& input, const DualPathOutputs& o) {
    dual_path_forward_cuda<T>(args, keep, input, o, context);
  }
  template <typename T>
  static std::vector<at::Tensor> backward(const DualPathArgs& args, const DualPathSaved& saved,
                                          const at::Tensor& grad_output, const std::vector<bool>& needs,
                                          at::TensorList weights) {
    return dual_path_backward_cuda<T>(args, saved, grad_output, needs, weights, context);
  }
};

struct EmulatedNormPool {
  using Guard = c10::Device;  // nothing to guard
  template <typename T>
  static void forward(const NormPoolArgs& args, const at::Tensor& input, const NormPoolOutputs& o) {
    NormPoolCuda<T>(args, input.options(), context).forward(input, o);
  }
  template <typename T>
  static std::vector<at::Tensor> backward(const NormPoolArgs& args, const NormPoolSaved& saved,
                                          const at::Tensor& grad_output, const std::vector<bool>& needs,
                                          at::TensorList norm) {
    return NormPoolCuda<T>(args, saved.input.options(), context).backward(saved, grad_output, needs, norm);
  }
};

struct EmulatedResidualDenseBlock {
  using Guard = c10::Device;  // nothing to guard
  template <typename T>
  static void forward(const ResidualDenseBlockArgs& args, const at::Tensor& outer, const ResidualDenseBlockOutputs& o) {
    ResidualDenseBlockCuda<T>(args, o.buffer, context).forward(outer, o.out);
  }
  template <typename T>
  static std::vector<at::Tensor> backward(const ResidualDenseBlockArgs& args, const at::Tensor& buffer,
                                          const at::Tensor& grad_output, const std::vector<bool>& needs,
                                          at::TensorList weights) {
    return ResidualDenseBlockCuda<T>(args, buffer, context).backward(grad_output, needs, weights);
  }
};

void update_running_stats(at::TensorList running_mean, at::TensorList running_var, at::TensorList batches,
                          const at::Tensor& mean, const at::Tensor& var, at::IntArrayRef offsets,
                          at::ArrayRef<double> momentum, int64_t count, const std::optional<at::Tensor>& total_count) {
  update_running_stats_on({running_mean, running_var, batches, mean, var, offsets, momentum, count, total_count},
                          context.stream);
}

// Products of torch's library, which are launches, too, and what they need on hosts only: copies in another type.
std::unique_ptr<torch::Library> products;
at::Tensor no_mm(const at::Tensor& a, const at::Tensor& b) { return at::empty({a.size(0), b.size(1)}, a.options()); }
at::Tensor& no_mm_out(const at::Tensor&, const at::Tensor&, at::Tensor& out) { return out; }
at::Tensor no_copy(const at::Tensor& from, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                   std::optional<at::Device>, std::optional<bool>, bool, std::optional<at::MemoryFormat>) {
  return at::empty(from.sizes(), from.options().dtype(dtype.value_or(from.scalar_type())));
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense_emulated, CPU, m) {
  m.impl("dense_block", &dense_block<EmulatedDenseBlock>);
  m.impl("_dense_block_backward", &dense_block_backward<EmulatedDenseBlock>);
  m.impl("dual_path_stage", &dual_path_stage<EmulatedDualPath>);
  m.impl("_dual_path_stage_backward", &dual_path_stage_backward<EmulatedDualPath>);
  m.impl("norm_relu_max_pool", &norm_relu_max_pool<EmulatedNormPool>);
  m.impl("_norm_relu_max_pool_backward", &norm_relu_max_pool_backward<EmulatedNormPool>);
  m.impl("residual_dense_block", &residual_dense_block<EmulatedResidualDenseBlock>);
  m.impl("_residual_dense_block_backward", &residual_dense_block_backward<EmulatedResidualDenseBlock>);
  m.impl("update_running_stats_", &update_running_stats);
}

}  // namespace fastdense

extern "C" {
void set_schedule(bool backwards, bool early_copies) {
  fastdense::emulation::backwards = backwards;
  fastdense::emulation::early_copies = early_copies;
}
void set_device(int64_t workspace_bytes, int64_t blocks, bool tf32) {
  fastdense::context.workspace_bytes = workspace_bytes;
  fastdense::context.blocks = blocks;
  fastdense::context.tf32 = fastdense::context.tf32_convolutions = tf32;
}
void set_kernels(const char* name) { fastdense::set_cuda_kernels(name); }
int64_t launches() { return fastdense::emulation::launches; }
// From now on launches do nothing, or what they should.
void skip_launches(bool skip) {
  fastdense::emulation::skips = skip;
  fastdense::emulation::skipped.clear();
}
// And products of torch.
void skip_products(bool skip) {
  using fastdense::products;
  products.reset();
  if (!skip) return;
  products = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__);
  products->impl("mm", &fastdense::no_mm);
  products->impl("mm.out", &fastdense::no_mm_out);
  products->impl("_to_copy", &fastdense::no_copy);
}
// Of those that did nothing a line each: how many, and the function that starts them.
const char* skipped_launches() {
  static std::string lines;
  lines.clear();
  for (const auto& [starter, count] : fastdense::emulation::skipped)
    lines += std::to_string(count) + " " + starter + "\n";
  return lines.c_str();
}
}

// SPDX-License-Identifier: Apache-2.0
#include <torch/library.h>

#include <limits>
#include <vector>

#include "cpu/block_backward.h"
#include "norm_relu_max_pool/norm_relu_max_pool.h"
#include "norm_relu_max_pool/norm_relu_max_pool_kernels.h"

namespace fastdense {
namespace {

// Mean and M2 of `count` numbers in a row: as columns of a matrix, which are then combined.
template <typename T>
Moments<double> plane_moments(const Conv1x1Kernels<T>& kernels, const T* x, int64_t count) {
  constexpr int64_t kColumns = 64;
  double mean[kColumns], m2[kColumns];
  Moments<double> total{0, 0, 0};
  const auto add = [&](const T* from, int64_t rows, int64_t columns) {
    if (rows == 0 || columns == 0) return;
    kernels.moments(from, columns, rows, columns, mean, m2);
    for (int64_t j = 0; j < columns; ++j) total = combine_moments<double>(total, {double(rows), mean[j], m2[j]});
  };
  const int64_t rows = count / kColumns;
  add(x, rows, kColumns);
  add(x + rows * kColumns, 1, count - rows * kColumns);
  return total;
}

template <typename T>
void batch_statistics(const BlockForward<T>& block, const NormPoolArgs& args, const T* x, accumulate_t<T>* mean,
                      accumulate_t<T>* var) {
  const int64_t c = args.channels, pixels = args.g.pixels();
  if (args.layout.channels_last) return block.statistics(x, c, args.values(), c, mean, var);
  const at::Tensor partial = BlockForward<T>::template temporary<double>({args.batch, 2, c});
  double* p = partial.mutable_data_ptr<double>();
  block.share_units(args.batch * c, [&](int64_t, int64_t plane) {
    const Moments<double> m = plane_moments(block.kernels, x + plane * pixels, pixels);
    double* to = p + plane / c * 2 * c + plane % c;
    to[0] = m.mean;
    to[c] = m.m2;
  });
  block.combine(partial, c, [&](int64_t) { return pixels; }, mean, var);
}

template <typename T>
NormPool<T> norm_pool(const NormPoolArgs& args, const typename BlockForward<T>::Coefficients& c, const at::Tensor& x) {
  return {args.g,        args.layout.channels_last,
          args.channels, c.scale(),
          c.shift(),     c.mean(),
          c.rstd(),      static_cast<const T*>(x.const_data_ptr())};
}

template <typename T>
class NormPoolWorkspace {
  using A = accumulate_t<T>;

 public:
  NormPoolWorkspace(const BlockForward<T>& block, const NormPool<T>& pool)
      : numbers_(norm_pool_kernels<T>(current_isa()).workspace(pool)),
        memory_(BlockForward<T>::template temporary<A>({block.workers, numbers_})) {}
  A* of(int64_t worker) const { return memory_.template mutable_data_ptr<A>() + worker * numbers_; }

 private:
  const int64_t numbers_;
  const at::Tensor memory_;
};

struct CpuEngine {
  using Guard = c10::Device;  // nothing to guard

  template <typename T>
  static void forward(const NormPoolArgs& args, const at::Tensor& input, const NormPoolOutputs& o) {
    using A = accumulate_t<T>;
    const BlockForward<T> block(args.process_group);
    const at::Tensor x = args.layout.arrange(input);
    A *mean = o.mean.mutable_data_ptr<A>(), *var = o.var.mutable_data_ptr<A>();
    if (!args.norm.frozen()) batch_statistics<T>(block, args, static_cast<const T*>(x.const_data_ptr()), mean, var);
    const auto c = block.coefficients(args.norm, mean, var, args.channels);
    const NormPoolForward<T> p{norm_pool<T>(args, c, x), static_cast<T*>(o.y.mutable_data_ptr()),
                               o.indices.dim() > 1 ? o.indices.mutable_data_ptr<uint8_t>() : nullptr};
    const auto& kernels = norm_pool_kernels<T>(current_isa());
    const NormPoolWorkspace<T> workspace(block, p);
    block.share_units(p.pooled_lines(args.batch),
                      [&](int64_t worker, int64_t line) { kernels.forward(p, line, workspace.of(worker)); });
  }

  template <typename T>
  static std::vector<at::Tensor> backward(const NormPoolArgs& args, const NormPoolSaved& saved,
                                          const at::Tensor& grad_output, const std::vector<bool>& needs,
                                          at::TensorList norm) {
    using A = accumulate_t<T>;
    BlockBackward<T> block(needs, norm, saved.input.options(), args.channels, args.process_group);
    const at::Tensor x = args.layout.arrange(saved.input), grad = args.layout.arrange(grad_output);
    const at::Tensor indices = args.layout.arrange(saved.indices);
    const auto c =
        block.coefficients(args.norm, saved.mean.const_data_ptr<A>(), saved.var.const_data_ptr<A>(), args.channels);
    int64_t offsets[kNoIndex + 1];
    std::fill(offsets, offsets + kNoIndex + 1, std::numeric_limits<int64_t>::min() / 2);
    for (int w = 0; w < int(args.g.volume()) && w < kNoIndex; ++w)
      offsets[w] = position_offset(args.g, w) * (args.layout.channels_last ? args.channels : 1);
    NormPoolBackward<T> p{norm_pool<T>(args, c, x),
                          static_cast<const T*>(grad.const_data_ptr()),
                          indices.const_data_ptr<uint8_t>(),
                          offsets,
                          x.numel(),
                          nullptr,
                          nullptr,
                          nullptr,
                          A(0)};
    const auto& kernels = norm_pool_kernels<T>(current_isa());
    const at::Tensor no_weights = block.worker_gradients(false, 0, 0);
    const NormPoolWorkspace<T> workspace(block, p);
    if (!args.norm.frozen() || needs[1] || needs[2])
      block.for_each_worker(p.pooled_lines(args.batch), [&](int64_t worker, int64_t line) {
        const auto epilogue = block.epilogue(worker, nullptr, 0, false, nullptr, no_weights);
        kernels.sums(p, line, epilogue.sum, epilogue.weighted, workspace.of(worker));
      });
    const auto sums = block.norm_gradients(args.norm, c);
    at::Tensor memory;
    const NormBackward<T> terms = block.norm_backward(args.norm, c, sums, nullptr, nullptr, args.values(), memory);
    if (!needs[0]) return block.grads();
    p.t1 = terms.t1;
    p.t2 = terms.t2;
    p.inv_count = terms.inv_count;
    block.grads()[0] = args.layout.empty(saved.input.sizes(), saved.input.options());
    p.dx = static_cast<T*>(block.grads()[0].mutable_data_ptr());
    block.share_units(p.gradient_units(args.batch),
                      [&](int64_t worker, int64_t unit) { kernels.input_gradient(p, unit, workspace.of(worker)); });
    return block.grads();
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) {
  m.impl("norm_relu_max_pool", &norm_relu_max_pool<CpuEngine>);
  m.impl("_norm_relu_max_pool_backward", &norm_relu_max_pool_backward<CpuEngine>);
}
TORCH_LIBRARY_IMPL(fastdense_meta, Meta, m) {
  m.impl("norm_relu_max_pool", &norm_relu_max_pool<CpuEngine>);
  m.impl("_norm_relu_max_pool_backward", &norm_relu_max_pool_backward<CpuEngine>);
}

}  // namespace fastdense

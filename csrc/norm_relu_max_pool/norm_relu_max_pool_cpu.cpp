// SPDX-License-Identifier: Apache-2.0
#include <torch/library.h>

#include <limits>
#include <vector>

#include "common/row_gradients.h"
#include "norm_relu_max_pool/norm_relu_max_pool.h"
#include "norm_relu_max_pool/norm_relu_max_pool_kernels.h"

namespace fastdense {
namespace {

// Mean and M2 of `count` numbers in a row: as columns of a matrix, which are then combined.
template <typename T>
Moments<double> plane_moments(const RowKernels<T>& kernels, const T* x, int64_t count) {
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
void batch_statistics(const RowDriver<T>& rows, const NormPoolArgs& args, const T* x, accumulate_t<T>* mean,
                      accumulate_t<T>* var) {
  const int64_t c = args.channels, pixels = args.g.pixels();
  if (args.layout.channels_last) return rows.statistics(x, c, args.values(), c, mean, var);
  const at::Tensor partial = RowDriver<T>::template temporary<double>({args.batch, 2, c});
  double* p = partial.mutable_data_ptr<double>();
  rows.for_each_worker(args.batch * c, [&](int64_t, int64_t plane) {
    const Moments<double> m = plane_moments(rows.kernels, x + plane * pixels, pixels);
    double* to = p + plane / c * 2 * c + plane % c;
    to[0] = m.mean;
    to[c] = m.m2;
  });
  rows.combine(partial, c, [&](int64_t) { return pixels; }, mean, var);
}

template <typename T>
NormPool<T> norm_pool(const NormPoolArgs& args, const typename RowDriver<T>::Coefficients& c, const at::Tensor& x) {
  return {args.g,        args.layout.channels_last,
          args.channels, c.scale(),
          c.shift(),     c.mean(),
          c.rstd(),      static_cast<const T*>(x.const_data_ptr())};
}

// body(worker, unit, scratch) for all units.
template <typename T, typename Body>
void for_each_unit(const RowDriver<T>& rows, const NormPool<T>& pool, int64_t units, const Body& body) {
  using A = accumulate_t<T>;
  const int64_t numbers = norm_pool_kernels<T>(simd_level()).scratch(pool);
  const at::Tensor scratch = RowDriver<T>::template temporary<A>({rows.workers, numbers});
  A* room = scratch.template mutable_data_ptr<A>();
  rows.for_each_worker(units, [&](int64_t worker, int64_t unit) { body(worker, unit, room + worker * numbers); });
}

struct CpuEngine {
  using Guard = c10::Device;  // nothing to guard

  template <typename T>
  static void forward(const NormPoolArgs& args, const at::Tensor& input, const NormPoolOutputs& o) {
    using A = accumulate_t<T>;
    const RowDriver<T> rows(args.process_group);
    const at::Tensor x = args.layout.arrange(input);
    A *mean = o.mean.mutable_data_ptr<A>(), *var = o.var.mutable_data_ptr<A>();
    if (!args.norm.frozen()) batch_statistics<T>(rows, args, static_cast<const T*>(x.const_data_ptr()), mean, var);
    const auto c = rows.coefficients(args.norm, mean, var, args.channels);
    const NormPoolForward<T> p{norm_pool<T>(args, c, x), static_cast<T*>(o.y.mutable_data_ptr()),
                               o.winners.dim() > 1 ? o.winners.mutable_data_ptr<uint8_t>() : nullptr};
    const auto& kernels = norm_pool_kernels<T>(simd_level());
    for_each_unit<T>(rows, p, p.pooled_lines(args.batch),
                     [&](int64_t, int64_t line, A* room) { kernels.forward(p, line, room); });
  }

  template <typename T>
  static std::vector<at::Tensor> backward(const NormPoolArgs& args, const NormPoolSaved& saved,
                                          const at::Tensor& grad_output, const std::vector<bool>& needs,
                                          at::TensorList norm) {
    using A = accumulate_t<T>;
    RowGradients<T> rows(needs, norm, saved.input.options(), args.channels, args.process_group);
    const at::Tensor x = args.layout.arrange(saved.input), grad = args.layout.arrange(grad_output);
    const at::Tensor winners = args.layout.arrange(saved.winners);
    const auto c =
        rows.coefficients(args.norm, saved.mean.const_data_ptr<A>(), saved.var.const_data_ptr<A>(), args.channels);
    int64_t offsets[kNoWinner + 1];
    std::fill(offsets, offsets + kNoWinner + 1, std::numeric_limits<int64_t>::min() / 2);
    for (int w = 0; w < int(args.g.volume()) && w < kNoWinner; ++w)
      offsets[w] = position_offset(args.g, w) * (args.layout.channels_last ? args.channels : 1);
    NormPoolBackward<T> p{norm_pool<T>(args, c, x),
                          static_cast<const T*>(grad.const_data_ptr()),
                          winners.const_data_ptr<uint8_t>(),
                          offsets,
                          x.numel(),
                          nullptr,
                          nullptr,
                          nullptr,
                          A(0)};
    const auto& kernels = norm_pool_kernels<T>(simd_level());
    const at::Tensor no_weights = rows.worker_gradients(false, 0, 0);
    if (!args.norm.frozen() || needs[1] || needs[2])
      for_each_unit<T>(rows, p, p.pooled_lines(args.batch), [&](int64_t worker, int64_t line, A* room) {
        const auto sink = rows.sink(worker, nullptr, 0, false, nullptr, no_weights);
        kernels.sums(p, line, sink.sum, sink.weighted, room);
      });
    const auto sums = rows.norm_gradients(args.norm, c);
    at::Tensor room;
    const NormBackward<T> terms = rows.norm_backward(args.norm, c, sums, nullptr, nullptr, args.values(), room);
    if (!needs[0]) return rows.grads();
    p.t1 = terms.t1;
    p.t2 = terms.t2;
    p.inv_count = terms.inv_count;
    rows.grads()[0] = args.layout.empty(saved.input.sizes(), saved.input.options());
    p.dx = static_cast<T*>(rows.grads()[0].mutable_data_ptr());
    for_each_unit<T>(rows, p, p.gradient_units(args.batch),
                     [&](int64_t, int64_t unit, A* scratch) { kernels.input_gradient(p, unit, scratch); });
    return rows.grads();
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

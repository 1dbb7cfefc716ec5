// SPDX-License-Identifier: Apache-2.0
// What forward and backward of the CPU dense block share: threads, chunks, scratch, packed weights, coefficients.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <type_traits>

#include "common/storage.h"
#include "dense_block/dense_block.h"
#include "dense_block/dense_block_math.h"

namespace fastdense {

template <typename T>
class DenseBlockDriver {
 public:
  using A = accumulate_t<T>;
  static constexpr at::ScalarType kAccumulate = std::is_same_v<A, double> ? at::kDouble : at::kFloat;

  explicit DenseBlockDriver(const DenseBlockArgs& args)
      : args(args), kernels(dense_block_kernels<T>(simd_level())), workers(std::max(1, at::get_num_threads())) {
    slab_planes_ = choose_slab();
    const int64_t taps = args.conv.taps() * args.growth;
    const int64_t tail = args.tail_conv.defined() ? args.tail_conv.size(0) : 0;
    scratch_bytes_ = kernels.scratch_bytes(std::max(args.channels(), args.width), std::max({taps, args.width, tail}),
                                           slab_planes_ * args.conv.plane() * args.growth);
    scratch_ = bytes(workers * scratch_bytes_);
  }

  template <typename V>
  static at::Tensor temporary(at::IntArrayRef sizes) {
    constexpr at::ScalarType type = std::is_same_v<V, double> ? at::kDouble : at::kFloat;
    return at::empty(sizes, at::TensorOptions().dtype(type));
  }

  static at::Tensor bytes(int64_t count) { return at::empty({count}, at::TensorOptions().dtype(at::kByte)); }

  void* scratch(int64_t worker) const { return scratch_.mutable_data_ptr<uint8_t>() + worker * scratch_bytes_; }

  // body(worker, chunk, first row, rows) for chunks of at most `most` rows.  Worker w always gets the same run of
  // chunks, whichever thread runs it, so sums per worker do not depend on scheduling.
  template <typename Body>
  void for_each_chunk(int64_t rows, int64_t most, const Body& body) const {
    const int64_t step = chunk_step(rows, most), chunks = num_chunks(rows, most);
    for_each_worker(chunks, [&](int64_t worker, int64_t chunk) {
      body(worker, chunk, chunk * step, std::min(step, rows - chunk * step));
    });
  }

  int64_t num_chunks(int64_t rows, int64_t most) const {
    const int64_t step = chunk_step(rows, most);
    return (rows + step - 1) / step;
  }

  int64_t chunk_count(int64_t rows, int64_t most, int64_t chunk) const {
    const int64_t step = chunk_step(rows, most);
    return std::min(step, rows - chunk * step);
  }

  // body(worker, unit) for all units; contiguous runs of units per worker.
  template <typename Body>
  void for_each_worker(int64_t units, const Body& body) const {
    const int64_t used = std::min(workers, units);
    at::parallel_for(0, used, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker)
        for (int64_t unit = worker * units / used; unit < (worker + 1) * units / used; ++unit) body(worker, unit);
    });
  }

  // weight [n, depth] (or its transpose) in panels for the kernels; its data is at panels_of().
  at::Tensor pack(const A* weight, int64_t depth, int64_t n, int64_t depth_stride, int64_t column_stride) const {
    const int64_t panels = (n + kernels.panel - 1) / kernels.panel;
    at::Tensor packed = bytes(panels * kernels.panel * padded_depth(depth) * kernels.operand_bytes);
    void* out = packed.mutable_data_ptr();
    for_each_worker(panels, [&](int64_t, int64_t panel) {
      kernels.pack(weight, depth, n, depth_stride, column_stride, panel, panel + 1, out);
    });
    return packed;
  }

  static const void* panels_of(const at::Tensor& packed) { return packed.const_data_ptr(); }

  int64_t padded(int64_t n) const { return (n + kernels.panel - 1) / kernels.panel * kernels.panel; }
  int64_t padded_depth(int64_t depth) const { return (depth + kernels.align - 1) / kernels.align * kernels.align; }

  static at::Tensor accumulate_type(const at::Tensor& t) { return t.to(kAccumulate).contiguous(); }

  // conv2 [k, in, kernel...] as rows [taps * k, in].
  static at::Tensor tap_rows(const at::Tensor& conv2) {
    const at::Tensor w = accumulate_type(conv2);
    return w.reshape({w.size(0), w.size(1), -1}).permute({2, 0, 1}).reshape({-1, w.size(1)}).contiguous();
  }

  struct Coefficients {
    at::Tensor tensor;  // [4, n]: scale, shift, mean, rstd
    int64_t n;
    const A* row(int i) const { return tensor.const_data_ptr<A>() + i * n; }
    const A* scale() const { return row(0); }
    const A* shift() const { return row(1); }
    const A* mean() const { return row(2); }
    const A* rstd() const { return row(3); }
  };

  // From batch statistics, or from the running ones of a frozen norm.
  Coefficients coefficients(const NormArgs& norm, const A* batch_mean, const A* batch_var, int64_t n) const {
    Coefficients c{temporary<A>({4, n}), n};
    A* out = c.tensor.template mutable_data_ptr<A>();
    const at::Tensor weight = norm.weight.defined() ? accumulate_type(norm.weight) : norm.weight;
    const at::Tensor bias = norm.bias.defined() ? accumulate_type(norm.bias) : norm.bias;
    const at::Tensor mean = norm.frozen() ? accumulate_type(norm.running_mean) : norm.running_mean;
    const at::Tensor var = norm.frozen() ? accumulate_type(norm.running_var) : norm.running_var;
    const A* m = norm.frozen() ? mean.const_data_ptr<A>() : batch_mean;
    const A* v = norm.frozen() ? var.const_data_ptr<A>() : batch_var;
    const A* w = weight.defined() ? weight.const_data_ptr<A>() : nullptr;
    const A* b = bias.defined() ? bias.const_data_ptr<A>() : nullptr;
    for (int64_t j = 0; j < n; ++j) {
      const auto k = norm_coefficients<A>(w ? w[j] : A(1), b ? b[j] : A(0), m[j], v[j], A(norm.eps));
      out[j] = k.scale;
      out[n + j] = k.shift;
      out[2 * n + j] = k.mean;
      out[3 * n + j] = k.rstd;
    }
    return c;
  }

  static Source<T> source(const T* x, int64_t ld, const Coefficients& c) { return {x, ld, c.n, c.scale(), c.shift()}; }

  // z [pixels, b] = act(prefix) * conv1^T; partial [chunks, 2, b]: mean and M2 of each chunk, or nullptr.
  void make_bottleneck(const LayerArgs& layer, const Source<T>& prefix, T* z, double* partial) const {
    const int64_t c = layer.channels, b = args.width;
    const at::Tensor weight = accumulate_type(layer.conv1);
    const at::Tensor packed = pack(weight.template const_data_ptr<A>(), c, b, 1, c);
    const void* panels = this->panels_of(packed);
    for_each_chunk(args.pixels(), kernels.chunk_rows(c), [&](int64_t worker, int64_t chunk, int64_t row, int64_t rows) {
      double* moments = partial ? partial + 2 * chunk * b : nullptr;
      kernels.product(prefix, nullptr, row, rows, panels, b, z, b, moments, moments ? moments + b : nullptr,
                      scratch(worker));
    });
  }

  Dropout dropout(uint64_t seed, int64_t layer) const { return {args.drop_rate, seed, uint32_t(layer)}; }

  int64_t slabs_per_image() const { return (args.conv.size[0] + slab_planes_ - 1) / slab_planes_; }
  int64_t slab_planes() const { return slab_planes_; }

  const DenseBlockArgs& args;
  const DenseBlockKernels<T>& kernels;
  const int64_t workers;

 private:
  // Enough chunks for all workers, equal in size, and rows a multiple of every tile where there are many.
  int64_t chunk_step(int64_t rows, int64_t most) const {
    const int64_t chunks = std::max<int64_t>(1, (rows + most - 1) / most);
    const int64_t balanced = (chunks + workers - 1) / workers * workers;
    const int64_t step = (rows + balanced - 1) / balanced;
    const int64_t multiple = std::max<int64_t>(kernels.align, 12), whole = (step + multiple - 1) / multiple * multiple;
    return std::max<int64_t>(1, step > 48 && whole <= most ? whole : step);
  }

  // Outermost indices of a slab of the convolution: whole images where they share out evenly, else parts of them, whose
  // halo is activated twice.
  int64_t choose_slab() const {
    constexpr int64_t kMostElements = int64_t(1) << 22;
    const int64_t outer = std::max<int64_t>(1, args.conv.size[0]);
    int64_t parts = 1;
    while (parts * 4 < outer && args.batch * parts < 8 * workers && args.batch * parts % workers != 0) ++parts;
    const int64_t fit = std::max<int64_t>(1, kMostElements / std::max<int64_t>(1, args.conv.plane() * args.growth));
    return std::max<int64_t>(1, std::min((outer + parts - 1) / parts, std::max<int64_t>(fit, 4)));
  }

  int64_t slab_planes_ = 1;
  int64_t scratch_bytes_ = 0;
  at::Tensor scratch_;
};

}  // namespace fastdense

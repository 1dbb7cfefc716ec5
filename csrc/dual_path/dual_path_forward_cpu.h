// SPDX-License-Identifier: Apache-2.0
// Forward of the dual path stage on the CPU, in training and in inference.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "dual_path/dual_path_cpu.h"

namespace fastdense {

template <typename T>
class DualPathForward : BlockForward<T> {
  using Base = BlockForward<T>;
  using A = typename Base::A;
  using typename Base::Coefficients;
  using Statistics = typename DualPathBlocks<T>::Statistics;

 public:
  // packed: weights that were packed before, as pack_dual_path_stage returns them but for the header, or nothing.
  DualPathForward(const DualPathArgs& args, DualPathKeep keep, const DualPathOutputs& o, at::ScalarType dtype,
                  at::TensorList packed = {})
      : Base(args.process_group),
        args_(args),
        keep_(keep),
        o_(o),
        blocks_(args, *this, dtype),
        pixels_(args.pixels()),
        ld_(args.channels()),
        out_(static_cast<T*>(o.out.mutable_data_ptr())),
        mean_(o.mean.mutable_data_ptr<A>()),
        var_(o.var.mutable_data_ptr<A>()),
        dense_mean_(size_t(args.dense(args.num_blocks()))),
        dense_var_(dense_mean_.size()),
        statistics_(args.any_batch_statistics()) {
    blocks_.take_packed(packed);
    if (!keep.bottlenecks) one_a_ = at::empty({std::max(args.in_pixels(), pixels_), args.width_a}, o.out.options());
  }

  void run(const at::Tensor& input) {
    input_ = to_channels_last(input);
    const T* x = static_cast<const T*>(input_.const_data_ptr());
    const int64_t c = args_.in_channels, at = args_.blocks[0].stats_a;
    if (statistics_) this->statistics(x, c, args_.in_pixels(), c, mean_ + at, var_ + at);
    Columns<const T> residual{x, c};
    if (args_.projection) {
      std::copy_n(mean_ + at, c, mean_ + args_.stats_w);
      std::copy_n(var_ + at, c, var_ + args_.stats_w);
      project(x);
      residual = {after(0).data, after(0).ld};
    } else {
      o_.out.narrow(1, args_.residual, args_.first_dense).copy_(input_.narrow(1, args_.residual, args_.first_dense));
      std::copy_n(mean_ + at + args_.residual, args_.first_dense, dense_mean_.begin());
      std::copy_n(var_ + at + args_.residual, args_.first_dense, dense_var_.begin());
    }
    for (int64_t i = 0; i < args_.num_blocks(); ++i) {
      block(i, i == 0 ? Columns<const T>{x, c} : residual, residual);
      residual = {after(i).data, after(i).ld};
    }
  }

 private:
  // Where block i leaves the residual path.
  Columns<T> after(int64_t i) const {
    if (!keep_.residuals || i == args_.num_blocks() - 1) return {out_, ld_};
    return {static_cast<T*>(o_.residuals[i].mutable_data_ptr()), args_.residual};
  }

  Statistics dense_statistics(int64_t first) {
    return statistics_ ? Statistics{dense_mean_.data() + first, dense_var_.data() + first} : Statistics{};
  }

  // The split: residual_0 and the first dense channels.
  void project(const T* x) {
    const Coefficients c =
        blocks_.coefficients(0, args_.norm_w, mean_ + args_.stats_w, var_ + args_.stats_w, args_.in_channels);
    const Columns<T> residual = after(0);
    blocks_.conv1x1(blocks_.panels(0, args_.conv_w), {this->source(x, args_.in_channels, c)},
                    args_.strided() ? &args_.sampled : nullptr, pixels_,
                    {{residual.data, residual.ld, args_.residual}, {out_ + args_.residual, ld_, args_.first_dense}},
                    {Statistics{}, dense_statistics(0)});
  }

  // Block i reads `in` and adds to `residual`.
  void block(int64_t i, Columns<const T> in, Columns<const T> residual) {
    const DualPathBlockArgs& block = args_.blocks[size_t(i)];
    if (i > 0) take_dense_statistics(block);
    const Coefficients ca = blocks_.coefficients(args_.pair_a(i), block.norm_a, mean_ + block.stats_a,
                                                 var_ + block.stats_a, block.channels);
    T* a = bottleneck_a(i);
    const bool batch_b = !block.norm_b.frozen();
    blocks_.make_a(i, blocks_.sources(i, ca, in, {out_ + args_.residual, ld_}), a,
                   batch_b ? Statistics{mean_ + block.stats_b, var_ + block.stats_b} : Statistics{});
    const at::Tensor b = bottleneck_b(i, a);
    merge(i, static_cast<const T*>(b.const_data_ptr()), residual);
  }

  // The statistics of the dense channels that a block reads are those taken when they were written.
  void take_dense_statistics(const DualPathBlockArgs& block) {
    const int64_t n = block.channels - args_.residual, at = block.stats_a + args_.residual;
    std::copy_n(dense_mean_.begin(), n, mean_ + at);
    std::copy_n(dense_var_.begin(), n, var_ + at);
  }

  T* bottleneck_a(int64_t i) const {
    if (!keep_.bottlenecks) return static_cast<T*>(one_a_.mutable_data_ptr());
    return static_cast<T*>(o_.a.mutable_data_ptr()) + args_.a_row(i) * args_.width_a;
  }

  // [pixels, rb]
  at::Tensor bottleneck_b(int64_t i, const T* a) {
    const DualPathBlockArgs& block = args_.blocks[size_t(i)];
    const Coefficients c =
        blocks_.coefficients(args_.pair_b(i), block.norm_b, mean_ + block.stats_b, var_ + block.stats_b, args_.width_a);
    const at::Tensor u = blocks_.activate_a(i, a, c, o_.out.options());
    return blocks_.make_b(
        i, a, c, u, keep_.bottlenecks ? o_.b.narrow(0, i * pixels_, pixels_) : at::Tensor(), o_.out.options(),
        block.norm_c.frozen() ? Statistics{} : Statistics{mean_ + block.stats_c, var_ + block.stats_c});
  }

  void merge(int64_t i, const T* b, Columns<const T> residual) {
    const DualPathBlockArgs& block = args_.blocks[size_t(i)];
    const Coefficients c =
        blocks_.coefficients(args_.pair_c(i), block.norm_c, mean_ + block.stats_c, var_ + block.stats_c, args_.width_b);
    const Columns<T> to = after(i);
    const int64_t first = args_.dense(i);
    const bool last = i == args_.num_blocks() - 1;
    const int64_t next = last ? 0 : args_.blocks[size_t(i) + 1].stats_a;
    const bool wanted = statistics_ && !last;
    blocks_.conv1x1(blocks_.panels(args_.pair_c(i), block.conv_c), {this->source(b, args_.width_b, c)}, nullptr,
                    pixels_,
                    {{to.data, to.ld, args_.residual, nullptr, nullptr, residual.data, residual.ld},
                     {out_ + args_.residual + first, ld_, args_.growth}},
                    {wanted ? Statistics{mean_ + next, var_ + next} : Statistics{},
                     wanted ? dense_statistics(first) : Statistics{}});
  }

  const DualPathArgs& args_;
  const DualPathKeep keep_;
  const DualPathOutputs& o_;
  DualPathBlocks<T> blocks_;
  const int64_t pixels_, ld_;
  T* const out_;
  A *const mean_, *const var_;
  std::vector<A> dense_mean_, dense_var_;
  const bool statistics_;
  at::Tensor input_;
  at::Tensor one_a_;  // of one block at a time: [rows, ra]
};

}  // namespace fastdense

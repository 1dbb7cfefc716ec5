// SPDX-License-Identifier: Apache-2.0
// What forward and backward of the dual path stage share on the CPU: the inputs of conv_a, 1x1 convolutions with the
// statistics of their results, and the grouped convolution.
#pragma once

#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/block_forward.h"
#include "cpu/grouped_conv/grouped_conv.h"
#include "dual_path/dual_path.h"

namespace fastdense {

// conv_b through the library's convolution, on packed tensors with channels innermost.
class LibraryConvolution {
 public:
  LibraryConvolution(const DualPathArgs& args, at::ScalarType dtype)
      : args_(args), dtype_(dtype == at::kHalf ? at::kFloat : dtype) {  // for want of a fast product of halves
    for (size_t d = 0; d < args.kernel.size(); ++d) padding_.push_back(args.kernel[d] / 2);
    ones_.resize(args.kernel.size(), 1);
    zeros_.resize(args.kernel.size(), 0);
  }

  // Rows [pixels, channels] of block i as an image [N, channels, spatial].
  at::Tensor image(const at::Tensor& rows, int64_t i, bool behind) const {
    std::vector<int64_t> sizes = args_.sizes(rows.size(1), i == 0 && !behind);
    sizes.erase(sizes.begin() + 1);
    sizes.push_back(rows.size(1));
    return rows.view(sizes).movedim(-1, 1);
  }

  at::Tensor forward(int64_t i, const at::Tensor& u) const {
    return at::convolution(image(u, i, false).to(dtype_), weight(i), {}, stride(i), padding_, ones_, false, zeros_,
                           args_.groups);
  }

  // Gradients of u and of the weight; d is that of the output.
  std::tuple<at::Tensor, at::Tensor> backward(int64_t i, const at::Tensor& d, const at::Tensor& u,
                                              bool needs_weight) const {
    const auto [du, dweight, dbias] = at::convolution_backward(
        image(d, i, true).to(dtype_), image(u, i, false).to(dtype_), weight(i), at::OptionalIntArrayRef(), stride(i),
        padding_, ones_, false, zeros_, args_.groups, {true, needs_weight, false});
    return {to_channels_last(du.to(u.scalar_type())), dweight};
  }

 private:
  at::Tensor weight(int64_t i) const { return args_.blocks[size_t(i)].conv_b.weight.to(dtype_); }
  std::vector<int64_t> stride(int64_t i) const {
    return std::vector<int64_t>(args_.kernel.size(), i == 0 ? args_.sampled.stride[0] : 1);
  }

  // Under autocast the library would choose types of its own.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
  const DualPathArgs& args_;
  const at::ScalarType dtype_;
  std::vector<int64_t> padding_, ones_, zeros_;
};

// The same by our own kernels.  There are none for other kernels than 3x3, for many channels a group, and for types of
// 16 bits.  The library is faster from 25 channels a group on where there is no stride, by
// benchmarks/grouped_conv_targets.py with 32 at 7 x 7.
template <typename T>
std::optional<GroupedConv> own_convolution(const DualPathArgs& args, bool first) {
  const bool is_3x3 = args.kernel.size() == 2 && args.kernel[0] == 3 && args.kernel[1] == 3;
  const int64_t stride = first ? args.sampled.stride[0] : 1, in = args.width_a / args.groups,
                out = args.width_b / args.groups;
  const int64_t most = stride == 1 ? 24 : kMostGroupChannels;
  if (!std::is_same_v<T, accumulate_t<T>> || !is_3x3 || stride > 2 || std::max(in, out) > most) return {};
  const std::vector<int64_t> sizes = args.sizes(args.width_a, first);
  return GroupedConv{args.batch, sizes[2], sizes[3], stride, args.groups, in, out};
}

// A matrix [rows, ld] of which the first columns are meant.
template <typename T>
struct Columns {
  T* data;
  int64_t ld;
};

template <typename T>
class DualPathBlocks {
 public:
  using A = accumulate_t<T>;
  using Coefficients = typename BlockForward<T>::Coefficients;

  DualPathBlocks(const DualPathArgs& args, BlockForward<T>& block, at::ScalarType dtype)
      : library(args, dtype), args_(args), block_(block) {
    if constexpr (kHasOwn) {
      if (const auto conv = own_convolution<T>(args, true)) first_.emplace(block, *conv);
      if (const auto conv = own_convolution<T>(args, false)) others_.emplace(block, *conv);
    }
    const int64_t widest = std::max({args.channels(), args.in_channels, args.width_a, args.width_b});
    block.reserve_workspace(widest, widest);
  }

  // What conv_a of block i reads; `dense` are the dense channels.
  Sources<T> sources(int64_t i, const Coefficients& c, Columns<const T> residual, Columns<const T> dense) const {
    if (i == 0) return {block_.source(residual.data, residual.ld, c)};
    return {block_.source(residual.data, residual.ld, c, 0, args_.residual),
            block_.source(dense.data, dense.ld, c, args_.residual, c.n - args_.residual)};
  }

  // a = conv_a(act(sources)), and the batch statistics [ra] of the result where wanted.
  void make_a(int64_t i, const Sources<T>& sources, T* a, const BatchStatistics<A>& statistics) const {
    const DualPathBlockArgs& block = args_.blocks[size_t(i)];
    conv1x1(panels(args_.pair_a(i), block.conv_a), sources, nullptr, args_.a_pixels(i),
            {{a, args_.width_a, args_.width_a}}, {statistics});
  }

  // u = relu(norm_b(a)) for the library's convolution of block i; our own kernels make it as they read a.
  at::Tensor activate_a(int64_t i, const T* a, const Coefficients& c, const at::TensorOptions& options) const {
    if (own(i)) return {};
    const at::Tensor u = at::empty({args_.a_pixels(i), args_.width_a}, options);
    const Source<T> source = block_.source(a, args_.width_a, c);
    block_.share_chunks(args_.a_pixels(i), block_.kernels.chunk_rows(args_.width_a),
                        [&](int64_t, int64_t, int64_t, int64_t row, int64_t count) {
                          block_.kernels.norm(source, true, row, count, static_cast<T*>(u.mutable_data_ptr()));
                        });
    return u;
  }

  using Statistics = BatchStatistics<A>;

  // Targets of act(sources) * panels for `pixels` rows, and the batch statistics of each where wanted.
  void conv1x1(const at::Tensor& panels, const Sources<T>& sources, const PoolGeometry* pool, int64_t pixels,
               Targets<T> targets, std::array<Statistics, 2> statistics) const {
    // Both what a chunk reads and what it makes stay in cache.
    const int64_t most = block_.kernels.chunk_rows(std::max(sources.channels(), targets.columns()));
    const Chunks chunks = block_.chunks(pixels, most);
    at::Tensor partial[2];
    Target<T>* target[2] = {&targets.first, &targets.second};
    for (int t = 0; t < 2; ++t)
      partial[t] = block_.template temporary<double>({statistics[t].mean ? chunks.count : 0, 2, target[t]->columns});
    block_.share_chunks(pixels, most, [&](int64_t worker, int64_t chunk, int64_t, int64_t row, int64_t count) {
      Targets<T> to = targets;
      Target<T>* each[2] = {&to.first, &to.second};
      for (int t = 0; t < 2; ++t) {
        if (!statistics[t].mean) continue;
        each[t]->mean = partial[t].template mutable_data_ptr<double>() + 2 * chunk * each[t]->columns;
        each[t]->m2 = each[t]->mean + each[t]->columns;
      }
      block_.kernels.conv1x1(sources, pool, row, count, block_.panels_of(panels), to, block_.workspace(worker));
    });
    const auto count = [&](int64_t chunk) { return chunks.size(chunk); };
    for (int t = 0; t < 2; ++t)
      if (statistics[t].mean)
        block_.combine(partial[t], target[t]->columns, count, statistics[t].mean, statistics[t].var);
  }

  // b = conv_b(u) [pixels, rb], into `b` if it is defined, and its batch statistics where wanted.
  at::Tensor make_b(int64_t i, const T* a, const Coefficients& c, const at::Tensor& u, at::Tensor b,
                    const at::TensorOptions& options, const Statistics& statistics) const {
    if constexpr (kHasOwn)
      if (const auto& convolution = own(i)) {
        if (!b.defined()) b = at::empty({args_.pixels(), args_.width_b}, options);
        convolution->forward(packed_.empty() ? convolution->pack_forward(args_.blocks[size_t(i)].conv_b.weight)
                                             : packed_[size_t(2 * args_.pair_b(i) + 1)],
                             block_.source(a, args_.width_a, c), static_cast<T*>(b.mutable_data_ptr()), statistics);
        return b;
      }
    const at::Tensor y = library.forward(i, u);
    if (b.defined())
      library.image(b, i, true).copy_(y);
    else
      b = to_channels_last(y.to(u.scalar_type()));
    if (statistics.mean)
      block_.statistics(static_cast<const T*>(b.const_data_ptr()), args_.width_b, args_.pixels(), args_.width_b,
                        statistics.mean, statistics.var);
    return b;
  }

  // From now on weights are what pack() made of them, a list of coefficients and panels of each pair.
  void take_packed(at::TensorList packed) { packed_ = packed.vec(); }

  // Scale and shift of the norm of a pair, by its batch statistics where it is not frozen.
  Coefficients coefficients(int64_t pair, const NormArgs& norm, const A* mean, const A* var, int64_t n) const {
    if (packed_.empty()) return block_.coefficients(norm, mean, var, n);
    return {packed_[size_t(2 * pair)], n};
  }
  // The 1x1 convolution of a pair as products read it.
  at::Tensor panels(int64_t pair, const ConvArgs& conv) const {
    return packed_.empty() ? block_.pack_forward(conv.weight) : packed_[size_t(2 * pair + 1)];
  }

  // For types that have kernels of our own.
  static constexpr bool kHasOwn = std::is_same_v<T, A>;
  using Own = GroupedConvolution3x3<std::conditional_t<kHasOwn, T, float>>;
  const std::optional<Own>& own(int64_t i) const { return i == 0 ? first_ : others_; }

  const LibraryConvolution library;

 private:
  const DualPathArgs& args_;
  const BlockForward<T>& block_;
  std::optional<Own> first_, others_;  // of the first block, which may have a stride, and of those behind it
  std::vector<at::Tensor> packed_;     // empty where weights are packed for each use
};

}  // namespace fastdense

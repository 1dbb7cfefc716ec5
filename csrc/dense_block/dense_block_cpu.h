// SPDX-License-Identifier: Apache-2.0
// What forward and backward of the dense block share on the CPU: slabs of the convolution, and the bottleneck.
#pragma once

#include <cstring>
#include <vector>

#include "cpu/conv/conv2d_weights.h"
#include "dense_block/dense_block.h"
#include "dense_block/dense_block_kernels.h"

namespace fastdense {

// A block's rows with statistics of their own: all, or those of each sample.
inline RowSets row_sets(const DenseBlockArgs& args, int64_t rows) {
  return args.per_sample ? RowSets(args.batch, rows / args.batch) : RowSets(rows);
}

template <typename T>
class DenseBlockConvolution {
 public:
  using A = accumulate_t<T>;

  DenseBlockConvolution(const DenseBlockArgs& args, BlockForward<T>& block)
      : kernels(dense_block_kernels<T>(current_isa())), args_(args) {
    slab_planes_ = choose_slab(block.workers);
    const int64_t taps = args.conv.taps() * args.growth;
    const int64_t tail = args.tail == Tail::kTransition ? args.tail_conv.weight.size(0) : 0;
    block.reserve_workspace(
        std::max(args.channels(), args.width), std::max({taps, args.width, tail}),
        slab_planes_ * args.conv.plane() * args.growth * int64_t(sizeof(A)) + 64 +
            kernels.winograd_bytes(args.conv, std::max(args.bottleneck ? 0 : args.channels(), args.width),
                                   args.growth));
  }

  Dropout dropout(uint64_t seed, int64_t layer) const { return {args_.drop_rate, seed, uint32_t(layer)}; }

  int64_t slabs_per_image() const { return (args_.conv.size[0] + slab_planes_ - 1) / slab_planes_; }
  int64_t slab_planes() const { return slab_planes_; }

  const DenseBlockKernels<T>& kernels;

 private:
  // Outermost indices of a slab of the convolution: whole images where they share out evenly, else parts of them, whose
  // halo is activated twice.
  int64_t choose_slab(int64_t workers) const {
    constexpr int64_t kMostElements = int64_t(1) << 22;
    const int64_t outer = std::max<int64_t>(1, args_.conv.size[0]);
    int64_t parts = 1;
    while (parts * 4 < outer && args_.batch * parts < 8 * workers && args_.batch * parts % workers != 0) ++parts;
    const int64_t fit = std::max<int64_t>(1, kMostElements / std::max<int64_t>(1, args_.conv.plane() * args_.growth));
    return std::max<int64_t>(1, std::min((outer + parts - 1) / parts, std::max<int64_t>(fit, 4)));
  }

  const DenseBlockArgs& args_;
  int64_t slab_planes_ = 1;
};

// What stands behind a norm of `channels`, as sources take it.  Outlives them: they point here.
template <typename T>
class NormActivation {
 public:
  using A = accumulate_t<T>;

  NormActivation(const ActivationArgs& args, int64_t channels) : is_relu_(args.kind == Activation::kRelu) {
    if (is_relu_) return;
    const auto& p = args.parameters;
    activation_ = {row_activation<A>(current_isa(), args.kind), {A(p.a), A(p.b), A(p.c)}};
    if (args.kind != Activation::kLeakyRelu) return;
    slope_ = BlockForward<T>::template temporary<A>({channels});
    if (args.is_prelu)
      slope_.copy_(args.slope.weight);  // one for all of them, or one each
    else
      slope_.fill_(p.a);
    activation_.slope = slope_.template const_data_ptr<A>();
  }
  NormActivation(const NormActivation&) = delete;

  Source<T> of(Source<T> source) const {
    source.activation = is_relu_ ? nullptr : &activation_;
    return source;
  }

 private:
  const bool is_relu_;
  SourceActivation<A> activation_{};
  at::Tensor slope_;
};

// The 1x1 convolution of a layer, packed: z [pixels, b] = act(prefix) * conv1^T + bias.  A set of pixels has its row of
// the coefficients.
template <typename T>
class Bottleneck {
 public:
  using Coefficients = typename BlockForward<T>::Coefficients;

  Bottleneck(const BlockForward<T>& block, const LayerArgs& layer, const Source<T>& prefix, const Coefficients& c)
      : width(layer.conv1.weight.size(0)),
        block_(block),
        prefix_(prefix),
        c_(c),
        panels_(block.pack_forward(layer.conv1.weight)),
        bias_(block.bias_of(layer.bias1)) {}

  // Rows [row, row + rows) of z; moments [2, b]: their mean and M2, or nullptr.
  void make(int64_t worker, int64_t set, int64_t row, int64_t rows, T* z, double* moments = nullptr) const {
    block_.kernels.conv1x1(
        {block_.of_set(prefix_, c_, set)}, nullptr, row, rows, block_.panels_of(panels_),
        {{z, width, width, moments, moments ? moments + width : nullptr, nullptr, 0, block_.data_of(bias_)}},
        block_.workspace(worker));
  }

  // All rows; partial [chunks, 2, b]: mean and M2 of each chunk, or nullptr.
  void make_all(const RowSets& pixels, T* z, double* partial) const {
    block_.share_chunks(pixels, block_.kernels.chunk_rows(prefix_.channels),
                        [&](int64_t worker, int64_t chunk, int64_t set, int64_t row, int64_t rows) {
                          make(worker, set, row, rows, z, partial ? partial + 2 * chunk * width : nullptr);
                        });
  }

  const int64_t width;

 private:
  const BlockForward<T>& block_;
  const Source<T> prefix_;
  const Coefficients& c_;
  const at::Tensor panels_, bias_;
};

// z in pieces: each worker makes the rows that it is about to read, so that all of z is never there at once.
template <typename T>
class BottleneckPieces {
 public:
  BottleneckPieces(int64_t workers, int64_t most_rows, int64_t width, const at::TensorOptions& options)
      : most_(most_rows), width_(width), held_(size_t(workers)) {
    memory_ = at::empty({workers, most_rows, width}, options);
  }

  // From now on of this layer.
  void start(const Bottleneck<T>& layer) {
    layer_ = &layer;
    std::fill(held_.begin(), held_.end(), Rows{});
  }

  // Where z would begin that has rows [row, row + rows) in its place. What the worker has of them already stays.
  const T* of_rows(int64_t worker, int64_t set, int64_t row, int64_t rows) {
    Rows& held = held_[size_t(worker)];
    T* to = static_cast<T*>(memory_.mutable_data_ptr()) + worker * most_ * width_;
    int64_t kept = 0;
    if (held.begin <= row && row < held.end) {
      kept = std::min(held.end - row, rows);
      std::memmove(to, to + (row - held.begin) * width_, size_t(kept * width_) * sizeof(T));
    }
    T* z = to - row * width_;
    if (kept < rows) layer_->make(worker, set, row + kept, rows - kept, z);
    held = {row, row + rows};
    return z;
  }

 private:
  struct Rows {
    int64_t begin = 0, end = 0;
  };
  const int64_t most_, width_;
  const Bottleneck<T>* layer_ = nullptr;
  at::Tensor memory_;  // [workers, most_rows, width]
  std::vector<Rows> held_;
};

}  // namespace fastdense

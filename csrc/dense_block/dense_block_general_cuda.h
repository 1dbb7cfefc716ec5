// SPDX-License-Identifier: Apache-2.0
// The dense block on a CUDA device with any norms, activations and biases: the loops over layers between the kernels of
// cuda/norm_act/norm_act_launch.h and the library's products and convolutions.  Blocks of batch norms with ReLU and
// without bias take others (dense_block_forward_cuda.cpp, dense_block_backward_cuda.cpp).
#pragma once

#include <ATen/ops/zeros.h>

#include "cuda/norm_act/norm_act.h"
#include "dense_block/dense_block_cuda.h"

namespace fastdense {

template <typename T>
class GeneralCudaBlock : public CudaBlock<T> {
 public:
  using Base = CudaBlock<T>;
  using A = typename Base::A;
  using Base::args, Base::ld, Base::pixels;

  GeneralCudaBlock(const DenseBlockArgs& args, const at::TensorOptions& options, const std::optional<at::Tensor>& seed,
                   const CudaContext& cuda, const at::Tensor& mean, const at::Tensor& var)
      : Base(args, options, seed, cuda),
        norms(*this, args.sets(), this->sums(mean), this->sums(var), args.statistics()),
        set_pixels(pixels / std::max<int64_t>(1, args.sets())) {}
  GeneralCudaBlock(const GeneralCudaBlock&) = delete;

  NormAct<A> norm1(const LayerArgs& layer, const GroupStatistics& groups) {
    return norms.of(layer.norm1, layer.act1, 0, groups);
  }
  NormAct<A> norm2(int64_t l, const GroupStatistics& groups) {
    const LayerArgs& layer = args.layers[size_t(l)];
    return norms.of(layer.norm2, layer.act2, args.norm2_statistics(l), groups);
  }
  NormAct<A> tail_norm(const GroupStatistics& groups) {
    ActivationArgs act = args.tail_act;
    if (args.tail == Tail::kNorm) act.kind = Activation::kIdentity;
    return norms.of(args.tail_norm, act, 0, groups);
  }

  // act(norm(x)) as a packed image.
  at::Tensor activated(const NormAct<A>& n, const Matrix<const T>& x, int64_t channels) const {
    const at::Tensor y = this->packed_image(channels);
    norms.activate(n, x, {this->data(y), channels}, norms.all(pixels), channels);
    return y;
  }

  CudaNormAct<T> norms;
  const int64_t set_pixels;
};

template <typename T>
class GeneralForward : GeneralCudaBlock<T> {
  using Base = GeneralCudaBlock<T>;
  using Base::args, Base::ld, Base::norms, Base::pixels;
  using typename Base::A;

 public:
  GeneralForward(const DenseBlockArgs& args, const at::Tensor& input, const std::optional<at::Tensor>& seed,
                 const DenseBlockOutputs& o, const CudaContext& cuda)
      : Base(args, input.options(), seed, cuda, o.mean, o.var),
        x_{this->data(o.buffer), ld},
        z_(o.z),
        statistics_(args.any_batch_statistics()) {}

  void run(const at::Tensor& input, const DenseBlockOutputs& o) {
    this->pack_weights(0, false);
    o.buffer.narrow(1, 0, args.in_channels).copy_(input);
    if (statistics_) {
      prepare_next(0);
      norms.statistics(x_, pixels, {0, args.in_channels, true, groups_});
    }
    for (size_t l = 0; l < args.layers.size(); ++l)
      if (!args.layers[l].dropped) layer(int64_t(l));
    if (args.tail == Tail::kTransition) transition(o.out);
    if (args.tail == Tail::kNorm || args.tail == Tail::kNormRelu) last_norm(o.out);
  }

 private:
  // Room for what the norm that reads the layers before `l` needs: that of the first one from l on which is not
  // dropped.
  void prepare_next(size_t l) {
    while (l < args.layers.size() && args.layers[l].dropped) ++l;
    groups_ = l < args.layers.size()     ? norms.groups_of(args.layers[l].norm1, args.layers[l].channels)
              : args.tail != Tail::kNone ? norms.groups_of(args.tail_norm, ld)
                                         : GroupStatistics{};
  }

  void layer(int64_t l) {
    const LayerArgs& layer = args.layers[size_t(l)];
    const NormAct<A> norm1 = this->norm1(layer, groups_);
    if (!args.bottleneck) return convolution(l, this->activated(norm1, x_, layer.channels));
    const int64_t at = args.norm2_statistics(l), b = args.width;
    if (z_.size(0) == 0 && !one_z_.defined()) one_z_ = at::empty({pixels, b}, this->options);
    const at::Tensor z = z_.size(0) > 0 ? z_[layer.z_index] : one_z_;
    norms.product(norm1, x_, this->conv1(l), layer.bias1, this->set_pixels, z);
    const Matrix<const T> rows = this->const_matrix(z);
    const GroupStatistics groups = norms.groups_of(layer.norm2, b);
    if (!layer.norm2.frozen()) norms.statistics(rows, pixels, {at, b, true, groups, at});
    convolution(l, this->activated(this->norm2(l, groups), rows, b));
  }

  // The slice of layer l = dropout(conv2(u) + bias), with its statistics.
  void convolution(int64_t l, const at::Tensor& u) {
    const LayerArgs& layer = args.layers[size_t(l)];
    const at::Tensor features = this->convolved(l, u);
    if (statistics_) prepare_next(size_t(l) + 1);
    norms.slice_in({this->const_data(features), args.growth}, x_.from_column(layer.channels), layer.bias2,
                   this->dropout(l), pixels, {layer.channels, args.growth, statistics_, groups_});
  }

  void transition(const at::Tensor& out) {
    const int64_t rows = args.batch * args.pool.pixels();
    norms.product(this->tail_norm(groups_), x_, this->tail_conv(), args.tail_bias,
                  rows / std::max<int64_t>(1, norms.sets), out.movedim(1, -1).reshape({rows, out.size(1)}), &args.pool);
  }

  void last_norm(const at::Tensor& out) {
    norms.activate(this->tail_norm(groups_), x_, {this->data(out), ld}, norms.all(pixels), ld);
  }

  const Matrix<T> x_;
  const at::Tensor z_;
  const bool statistics_;
  at::Tensor one_z_;
  GroupStatistics groups_;  // of the norm that reads the channels so far
};

template <typename T>
class GeneralBackward : GeneralCudaBlock<T> {
  using Base = GeneralCudaBlock<T>;
  using Base::args, Base::ld, Base::norms, Base::pixels;
  using typename Base::A;
  using Consumers = CudaNormActBackward<T>;

 public:
  GeneralBackward(const DenseBlockArgs& args, const DenseBlockSaved& saved, const std::optional<at::Tensor>& seed,
                  const std::vector<bool>& needs, at::TensorList weights, const CudaContext& cuda)
      : Base(args, saved.buffer.options(), seed, cuda, saved.mean, saved.var),
        grads_(*this, needs, weights),
        consumers_(*this, norms, grads_),
        lowest_(args.lowest_layer(needs)),
        x_{this->const_data(saved.buffer), ld},
        z_(saved.z) {}

  std::vector<at::Tensor> run(const at::Tensor& grad_output) {
    this->pack_weights(lowest_, true);
    group_statistics();
    gradient_ = empty_channels_last(args.sizes(ld), this->options);
    g_ = {this->data(gradient_), ld};
    corrections_ = at::zeros({2, norms.sets, ld}, this->options.dtype(at::kDouble));
    if (args.tail == Tail::kNone) gradient_.copy_(grad_output);
    if (args.tail == Tail::kTransition) transition(to_channels_last(grad_output));
    if (args.tail == Tail::kNorm || args.tail == Tail::kNormRelu) last_norm(to_channels_last(grad_output));
    for (int64_t l = int64_t(args.layers.size()) - 1; l >= lowest_; --l)
      if (!args.layers[size_t(l)].dropped) layer(l);
    if (grads_.needs_input()) input();
    return grads_.take();
  }

 private:
  // Those of all norms that have groups of channels, from the statistics that forward took.
  void group_statistics() {
    groups1_.resize(args.layers.size());
    groups2_.resize(args.layers.size());
    for (size_t l = size_t(lowest_); l < args.layers.size(); ++l) {
      const LayerArgs& layer = args.layers[l];
      if (layer.dropped) continue;
      norms.note_groups(groups1_[l] = norms.groups_of(layer.norm1, layer.channels), 0);
      if (args.bottleneck)
        norms.note_groups(groups2_[l] = norms.groups_of(layer.norm2, args.width), args.norm2_statistics(int64_t(l)));
    }
    if (args.tail != Tail::kNone) norms.note_groups(tail_groups_ = norms.groups_of(args.tail_norm, ld), 0);
    norms.finalise_groups();
  }

  typename Consumers::Corrections deferred() const {
    return {corrections_.template mutable_data_ptr<double>(), ld, true};
  }
  // What reads the channels [0, c) of the buffer.
  typename Consumers::Consumer prefix(const NormArgs& norm, const ActivationArgs& act, const NormAct<A>& n, int64_t c,
                                      bool add) const {
    return {norm, act, n, x_, g_, add, 0, c};
  }

  // The tail is the first to write the gradient: it need not be cleared before.
  void transition(const at::Tensor& grad) {
    const at::Tensor rows = grad.movedim(1, -1).reshape({args.batch * args.pool.pixels(), grad.size(1)});
    const NormAct<A> n = this->tail_norm(tail_groups_);
    consumers_.set_bias(args.tail_bias, rows);
    consumers_.pooled_product(prefix(args.tail_norm, args.tail_act, n, ld, false), args.tail_conv, this->tail_conv(),
                              rows, args.pool, args.batch, deferred());
  }

  void last_norm(const at::Tensor& grad) {
    const NormAct<A> n = this->tail_norm(tail_groups_);
    consumers_.consume(prefix(args.tail_norm, args.tail_act, n, ld, false), {this->data(grad), ld}, pixels, deferred());
  }

  // Gradient of the channels [first, first + n), whose consumers are done, into a packed image.
  void finalised(int64_t first, int64_t n, const DropoutParams& dropout, const at::Tensor& to) {
    this->sync.means(corrections_, 2, first, n, pixels);
    consumers_.correct(g_.from_column(first), x_.from_column(first), {this->data(to), n}, pixels, first, n,
                       {deferred().sums + first, ld, true}, dropout);
  }

  void input() {
    const at::Tensor to = empty_channels_last(args.sizes(args.in_channels), this->options);
    finalised(0, args.in_channels, {}, to);
    grads_.set_input(to);
  }

  at::Tensor as_rows(const at::Tensor& image) const { return image.movedim(1, -1).reshape({pixels, image.size(1)}); }

  void layer(int64_t l) {
    const LayerArgs& layer = args.layers[size_t(l)];
    const NormAct<A> norm1 = this->norm1(layer, groups1_[size_t(l)]);
    const auto consumer = prefix(layer.norm1, layer.act1, norm1, layer.channels, true);
    const at::Tensor d = this->packed_image(args.growth);
    finalised(layer.channels, args.growth, this->dropout(l), d);
    consumers_.set_bias(layer.bias2, as_rows(d));
    if (!args.bottleneck) {
      const at::Tensor dy = convolution(l, d, this->activated(norm1, x_, layer.channels));
      return consumers_.consume(consumer, {this->data(dy), layer.channels}, pixels, deferred());
    }
    const at::Tensor dz = through_norm2(l, d, bottleneck(l, norm1));
    consumers_.set_bias(layer.bias1, dz);
    consumers_.product(consumer, layer.conv1, this->conv1(l), dz, this->set_pixels, deferred());
  }

  // The saved output of the 1x1, or the same recomputed.
  at::Tensor bottleneck(int64_t l, const NormAct<A>& norm1) {
    const LayerArgs& layer = args.layers[size_t(l)];
    if (z_.size(0) > 0) return z_[layer.z_index];
    if (!z_again_.defined()) z_again_ = at::empty({pixels, args.width}, this->options);
    norms.product(norm1, x_, this->conv1(l), layer.bias1, this->set_pixels, z_again_);
    return z_again_;
  }

  // Gradient of z [pixels, b] from that of the slice; those of conv2 and norm2 go to their places.
  at::Tensor through_norm2(int64_t l, const at::Tensor& d, const at::Tensor& z) {
    const LayerArgs& layer = args.layers[size_t(l)];
    const int64_t b = args.width, at = args.norm2_statistics(l);
    const NormAct<A> norm2 = this->norm2(l, groups2_[size_t(l)]);
    const Matrix<const T> rows = this->const_matrix(z);
    const at::Tensor du = convolution(l, d, this->activated(norm2, rows, b));
    const Matrix<T> gradient{this->data(du), b};
    if (!terms_.defined()) terms_ = at::empty({2, norms.sets, b}, this->options.dtype(at::kDouble));
    const typename Consumers::Corrections terms{terms_.template mutable_data_ptr<double>(), b, false};
    consumers_.consume({layer.norm2, layer.act2, norm2, rows, gradient, false, at, b}, gradient, pixels, terms);
    if (!layer.norm2.frozen()) {
      this->sync.means(terms_, pixels);
      consumers_.correct(gradient, rows, gradient, pixels, at, b, terms, {});
    }
    return as_rows(du);
  }

  // Gradient of the input u of conv2, packed; that of its weight goes to its place.
  at::Tensor convolution(int64_t l, const at::Tensor& d, const at::Tensor& u) {
    const ConvArgs& conv2 = args.layers[size_t(l)].conv2;
    const auto [du, dweight] = this->convolution_gradients(l, d, u, grads_.needs(conv2.at));
    if (grads_.needs(conv2.at)) grads_.set(conv2.at, dweight);
    return du;
  }

  CudaBlockBackward<T> grads_;
  Consumers consumers_;
  const int64_t lowest_;
  const Matrix<const T> x_;
  const at::Tensor z_;
  Matrix<T> g_{};
  at::Tensor z_again_, gradient_, corrections_, terms_;
  std::vector<GroupStatistics> groups1_, groups2_;  // of the norms of layers
  GroupStatistics tail_groups_;
};

}  // namespace fastdense

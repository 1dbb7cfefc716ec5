// SPDX-License-Identifier: Apache-2.0
// Backward of the dense block on the CPU.  Layers in reverse; `gradient_` collects scale * dy of all consumers, and
// corrections_ the norm corrections, until a slice is finalised.
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include "cpu/block_backward.h"
#include "dense_block/dense_block_cpu.h"
#include "dense_block/dense_block_ops.h"

namespace fastdense {
namespace {

template <typename T>
class Backward : BlockBackward<T> {
  using Base = BlockBackward<T>;
  using A = typename Base::A;
  using Base::kernels;
  using typename Base::Coefficients;
  using typename Base::Sums;

 public:
  Backward(const DenseBlockArgs& args, const DenseBlockSaved& saved, uint64_t seed, const std::vector<bool>& needs,
           at::TensorList weights)
      : Base(needs, weights, saved.buffer.options(), std::max(args.channels(), args.width), args.process_group,
             args.sets()),
        args_(args),
        conv_(args, *this),
        seed_(seed),
        pixels_(args.pixels()),
        sets_(row_sets(args, pixels_)),
        next_(args.statistics()),
        ld_(args.channels()),
        x_(static_cast<const T*>(saved.buffer.const_data_ptr())),
        mean_(saved.mean.const_data_ptr<A>()),
        var_(saved.var.const_data_ptr<A>()),
        z_(saved.z),
        lowest_layer_(args.lowest_layer(needs)),
        corrections_(ld_, args.sets()) {}

  std::vector<at::Tensor> run(const at::Tensor& grad_output) {
    gradient_ = empty_channels_last(args_.sizes(ld_), this->options());
    g_ = static_cast<T*>(gradient_.mutable_data_ptr());
    if (args_.tail == Tail::kNone)
      gradient_.copy_(grad_output);
    else
      gradient_.zero_();
    if (args_.tail == Tail::kTransition) transition(to_channels_last(grad_output));
    if (args_.tail == Tail::kNorm || args_.tail == Tail::kNormRelu) norm(to_channels_last(grad_output));
    for (int64_t l = int64_t(args_.layers.size()) - 1; l >= lowest_layer_; --l)
      if (!args_.layers[size_t(l)].dropped) layer(l);
    dv_ = z_again_ = d_ = at::Tensor();  // the input's gradient takes their place
    pieces_.reset();
    if (this->needs_input()) input();
    return this->grads();
  }

 private:
  // In front of a pass over what an activation of `channels` reads: its sums, and those of a bias.
  void start_sums(const ActivationArgs& act, int64_t channels, const ConvArgs& bias = {}) {
    const bool needs_slope = act.is_prelu && this->needs(act.slope.at);
    const bool needs_bias = bias.weight.defined() && this->needs(bias.at);
    this->start_extra_sums({needs_slope ? channels : 0, needs_bias ? bias.weight.numel() : 0});
  }
  // Behind the pass: gradients of PReLU's parameter and of the bias.
  void set_extras(const ActivationArgs& act, const ConvArgs& bias = {}) {
    if (act.is_prelu && this->needs(act.slope.at)) {
      const at::Tensor by_channel = this->slope_sum();
      this->set(act.slope.at, act.slope.weight.numel() == 1 ? by_channel.sum() : by_channel);
    }
    if (bias.weight.defined() && this->needs(bias.at)) this->set(bias.at, this->bias_sum());
  }

  // The consumer of a prefix is done: its parameter gradients, and the deferred correction of its channels.
  void consumed(const NormArgs& norm, const Coefficients& c) {
    const Sums s = this->norm_gradients(norm, c);
    this->defer(norm, c, s, sets_.rows, corrections_, mean_, next_);
  }

  // Coefficients of a norm of n channels whose statistics start at `at`.
  Coefficients norm_of(const NormArgs& norm, int64_t at, int64_t n) const {
    return this->coefficients(norm, mean_ + at, var_ + at, n, sets_.count, next_);
  }

  // Columns [first, first + n) of the gradient with their corrections, for a set.
  Gradient<T> corrected(const at::Tensor& corrections, int64_t first, int64_t n, int64_t set) const {
    const A* shift_sum = corrections.const_data_ptr<A>() + 2 * set * n;
    return {g_ + first, ld_, n, x_ + first, ld_, mean_ + set * next_ + first, shift_sum, shift_sum + n};
  }

  void transition(const at::Tensor& grad) {
    const int64_t co = args_.tail_conv.weight.size(0);
    const Coefficients c = norm_of(args_.tail_norm, 0, ld_);
    const at::Tensor panels = this->pack_backward(args_.tail_conv.weight, 0, ld_);
    const at::Tensor dweight = this->worker_gradients(this->needs(args_.tail_conv.at), co, ld_);
    const Gradient<T> dy{static_cast<const T*>(grad.const_data_ptr()), co, co};
    const NormActivation<T> act(args_.tail_act, ld_);
    const Source<T> source = act.of(this->source(x_, ld_, c));
    start_sums(args_.tail_act, ld_, args_.tail_bias);
    this->for_each_chunk(row_sets(args_, args_.batch * args_.pool.pixels()), kernels.backward_rows,
                         [&](int64_t worker, int64_t, int64_t set, int64_t row, int64_t rows) {
                           kernels.conv1x1_backward(this->of_set(source, c, set), &args_.pool, row, rows, {dy},
                                                    this->panels_of(panels),
                                                    this->epilogue(worker, g_, ld_, true, c.mean(set), dweight, set),
                                                    this->workspace(worker));
                         });
    if (this->needs(args_.tail_conv.at)) this->set(args_.tail_conv.at, this->total(dweight, co, ld_));
    set_extras(args_.tail_act, args_.tail_bias);
    consumed(args_.tail_norm, c);
  }

  void norm(const at::Tensor& grad) {
    const Coefficients c = norm_of(args_.tail_norm, 0, ld_);
    const at::Tensor none = this->worker_gradients(false, 0, 0);
    const T* dy = static_cast<const T*>(grad.const_data_ptr());
    const NormActivation<T> act(args_.tail_act, ld_);
    const Source<T> source = act.of(this->source(x_, ld_, c));
    start_sums(args_.tail_act, ld_);
    this->for_each_chunk(
        sets_, kernels.backward_rows, [&](int64_t worker, int64_t, int64_t set, int64_t row, int64_t rows) {
          kernels.norm_backward(this->of_set(source, c, set), args_.tail == Tail::kNormRelu, row, rows, dy,
                                this->epilogue(worker, g_, ld_, true, c.mean(set), none, set), this->workspace(worker));
        });
    set_extras(args_.tail_act);
    consumed(args_.tail_norm, c);
  }

  // Gradient [pixels, k] of the slice that layer l wrote; all its consumers are done.
  at::Tensor slice_gradient(int64_t l) {
    const int64_t c = args_.layers[l].channels, k = args_.growth;
    const at::Tensor corrections = this->take(corrections_, c, k, pixels_);
    if (!d_.defined()) d_ = this->bytes(pixels_ * k * kernels.operand_bytes);
    void* out = d_.mutable_data_ptr();
    const Dropout dropout = conv_.dropout(seed_, l);
    this->share_chunks(sets_, 4 * kernels.backward_rows, [&](int64_t, int64_t, int64_t set, int64_t row, int64_t rows) {
      conv_.kernels.finalise(corrected(corrections, c, k, set), row, rows, dropout, out);
    });
    return d_;
  }

  // [k]: sums over the pixels of the gradient of a slice, which is held as factors of products.
  at::Tensor sum_of_slice(const at::Tensor& d) const {
    const bool narrow = kernels.operand_bytes < int64_t(sizeof(A));
    const at::ScalarType type = narrow ? at::kBFloat16 : BlockForward<T>::kAccumulate;
    return at::sum(d.view(type).view({pixels_, args_.growth}), at::IntArrayRef({0}), false, at::kDouble);
  }

  void input() {
    const int64_t n = args_.in_channels;
    const at::Tensor corrections = this->take(corrections_, 0, n, pixels_);
    this->grads()[0] = empty_channels_last(args_.sizes(n), this->options());
    T* dx = static_cast<T*>(this->grads()[0].mutable_data_ptr());
    this->share_chunks(sets_, 4 * kernels.backward_rows, [&](int64_t, int64_t, int64_t set, int64_t row, int64_t rows) {
      kernels.finalise(corrected(corrections, 0, n, set), row, rows, dx);
    });
  }

  void layer(int64_t l) {
    const LayerArgs& layer = args_.layers[l];
    const Coefficients c1 = norm_of(layer.norm1, 0, layer.channels);
    const NormActivation<T> act1(layer.act1, layer.channels), act2(layer.act2, args_.width);
    const Source<T> prefix = act1.of(this->source(x_, ld_, c1));
    const at::Tensor d = slice_gradient(l);
    if (layer.bias2.weight.defined() && this->needs(layer.bias2.at)) this->set(layer.bias2.at, sum_of_slice(d));
    if (!args_.bottleneck) {
      start_sums(layer.act1, layer.channels);
      conv(layer, prefix, c1, d, g_, ld_, true);
      set_extras(layer.act1);
      return consumed(layer.norm1, c1);
    }
    std::optional<Bottleneck<T>> again;
    if (z_.size(0) == 0) again.emplace(static_cast<const BlockForward<T>&>(*this), layer, prefix, c1);
    const T* zp = again ? start(*again) : static_cast<const T*>(z_[layer.z_index].const_data_ptr());
    const int64_t at = args_.norm2_statistics(l), b = args_.width;
    const Coefficients c2 = norm_of(layer.norm2, at, b);
    if (!dv_.defined()) dv_ = at::empty({pixels_, b}, this->options());
    T* dvp = static_cast<T*>(dv_.mutable_data_ptr());
    start_sums(layer.act2, b);
    conv(layer, act2.of(this->source(zp, b, c2)), c2, d, dvp, b, false);
    set_extras(layer.act2);
    const Sums t = this->norm_gradients(layer.norm2, c2);
    at::Tensor memory;
    start_sums(layer.act1, layer.channels, layer.bias1);
    conv1x1(layer, prefix, c1, c2, this->norm_backward(layer.norm2, c2, t, dvp, zp, sets_.rows, memory));
    set_extras(layer.act1, layer.bias1);
    consumed(layer.norm1, c1);
  }

  // Makes the output of the 1x1 again, or gets ready to make pieces of it.
  const T* start(const Bottleneck<T>& bottleneck) {
    if (makes_pieces()) {
      if (!pieces_) pieces_.emplace(this->workers, most_piece_rows(), args_.width, this->options());
      pieces_->start(bottleneck);
      return nullptr;
    }
    if (!z_again_.defined()) z_again_ = at::empty({pixels_, args_.width}, this->options());
    T* z = static_cast<T*>(z_again_.mutable_data_ptr());
    bottleneck.make_all(sets_, z, nullptr);
    return z;
  }

  // Pieces are made twice, as dv is complete only when its sums are. That is worth it where z is large beside the
  // features: then layers are narrow, and the product costs little.
  bool makes_pieces() const {
    return args_.bottleneck && 2 * args_.width >= args_.channels() && this->workers * most_piece_rows() < pixels_;
  }
  int64_t most_piece_rows() const {
    if (!conv_.kernels.uses_winograd_backward(args_.conv)) return kernels.backward_rows;
    const int64_t rows = conv_.kernels.winograd_rows_backward(args_.conv, args_.growth) + args_.conv.kernel[0] / 2 * 2;
    return std::max(kernels.backward_rows, rows * args_.conv.size[1]);
  }

  // For a worker that is about to read rows of z.
  Source<T> reading(Source<T> source, int64_t worker, int64_t set, int64_t row, int64_t rows) {
    if (!source.x) source.x = pieces_->of_rows(worker, set, row, rows);
    return source;
  }

  void conv(const LayerArgs& layer, const Source<T>& source, const Coefficients& c, const at::Tensor& d, T* gradient,
            int64_t ld, bool accumulate) {
    if (conv_.kernels.uses_winograd_backward(args_.conv))
      return conv_winograd(layer, source, c, d, gradient, ld, accumulate);
    const int64_t k = args_.growth, depth = args_.conv.taps() * k, n = source.channels;
    const at::Tensor weight = BlockForward<T>::tap_rows(layer.conv2.weight);
    const at::Tensor panels = this->pack(weight.template const_data_ptr<A>(), depth, n, n, 1);
    const at::Tensor dweight = this->worker_gradients(this->needs(layer.conv2.at), depth, n);
    const SliceGradient slice{d.const_data_ptr(), k};
    this->for_each_chunk(
        sets_, kernels.backward_rows, [&](int64_t worker, int64_t, int64_t set, int64_t row, int64_t rows) {
          conv_.kernels.conv_backward(reading(this->of_set(source, c, set), worker, set, row, rows), args_.conv, row,
                                      rows, slice, this->panels_of(panels),
                                      this->epilogue(worker, gradient, ld, accumulate, c.mean(set), dweight, set),
                                      this->workspace(worker));
        });
    if (!this->needs(layer.conv2.at)) return;
    const at::Tensor by_tap = this->total(dweight, depth, n).reshape({args_.conv.taps(), k, n});
    this->set(layer.conv2.at, by_tap.permute({1, 2, 0}));
  }

  // The same by Winograd's products, in tiles of whole rows.
  void conv_winograd(const LayerArgs& layer, const Source<T>& source, const Coefficients& c, const at::Tensor& d,
                     T* gradient, int64_t ld, bool accumulate) {
    const auto& kernels = conv_.kernels;
    const int64_t k = args_.growth, height = args_.conv.size[0], rows = kernels.winograd_rows_backward(args_.conv, k);
    const int64_t tiles = (height + rows - 1) / rows;
    const bool needed = this->needs(layer.conv2.at);
    const at::Tensor panels = pack_conv2d_weight(*this, kernels, args_.conv, layer.conv2.weight, true);
    const at::Tensor dweight = this->worker_gradients(needed, kernels.products(args_.conv) * k, source.channels);
    const SliceGradient slice{d.const_data_ptr(), k};
    this->for_each_worker(args_.batch * tiles, [&](int64_t worker, int64_t unit) {
      const int64_t row = unit % tiles * rows;
      const int64_t image = unit / tiles, set = args_.per_sample ? image : 0;
      const int64_t columns = args_.conv.size[1], halo = args_.conv.kernel[0] / 2;
      const Tile tile{image, row, std::min(rows, height - row), 0, columns};
      // Squares reach beyond a tile of an odd number of rows, which is the last one of its image.
      const int64_t first = std::max<int64_t>(0, row - halo), last = std::min(height, row + rows + halo);
      const Source<T> read = reading(this->of_set(source, c, set), worker, set, (image * height + first) * columns,
                                     (last - first) * columns);
      kernels.conv_winograd_backward(read, args_.conv, tile, slice, this->panels_of(panels),
                                     this->epilogue(worker, gradient, ld, accumulate, c.mean(set), dweight, set),
                                     this->workspace(worker));
    });
    if (needed)
      this->set(layer.conv2.at, sum_conv2d_weight_gradient(*this, kernels, args_.conv, layer.conv2.weight, dweight));
  }

  void conv1x1(const LayerArgs& layer, const Source<T>& prefix, const Coefficients& c1, const Coefficients& c2,
               const NormBackward<T>& norm2) {
    const int64_t b = args_.width, c = layer.channels;
    const at::Tensor panels = this->pack_backward(layer.conv1.weight, 0, c);
    const at::Tensor dweight = this->worker_gradients(this->needs(layer.conv1.at), b, c);
    this->for_each_chunk(
        sets_, kernels.backward_rows, [&](int64_t worker, int64_t, int64_t set, int64_t row, int64_t rows) {
          NormBackward<T> norm = this->of_set(norm2, c2, set);
          if (!norm.z) norm.z = pieces_->of_rows(worker, set, row, rows);
          kernels.conv1x1_norm_backward(this->of_set(prefix, c1, set), row, rows, norm, this->panels_of(panels),
                                        this->epilogue(worker, g_, ld_, true, c1.mean(set), dweight, set),
                                        this->workspace(worker));
        });
    if (this->needs(layer.conv1.at)) this->set(layer.conv1.at, this->total(dweight, b, c));
  }

  const DenseBlockArgs& args_;
  const DenseBlockConvolution<T> conv_;
  const uint64_t seed_;
  const int64_t pixels_;
  const RowSets sets_;  // of pixels
  const int64_t next_;  // numbers between the statistics of two sets
  const int64_t ld_;
  const T* const x_;
  const A *const mean_, *const var_;
  const at::Tensor z_;
  const int64_t lowest_layer_;
  at::Tensor d_, dv_, z_again_;                // of one layer at a time: [pixels, k], [pixels, b], [pixels, b]
  std::optional<BottleneckPieces<T>> pieces_;  // in the place of z_again_
  at::Tensor gradient_;                        // [N, C, spatial], channels innermost
  T* g_ = nullptr;
  Corrections corrections_;
};

struct BackwardEngine {
  using Guard = c10::Device;  // nothing to guard
  template <typename T>
  static std::vector<at::Tensor> backward(const DenseBlockArgs& args, const DenseBlockSaved& saved,
                                          const at::Tensor& grad_output, const std::optional<at::Tensor>& seed,
                                          const std::vector<bool>& needs, at::TensorList weights) {
    const uint64_t value = args.drop_rate > 0 ? uint64_t(seed->item<int64_t>()) : 0;
    return Backward<T>(args, saved, value, needs, weights).run(grad_output);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) { m.impl("_dense_block_backward", &dense_block_backward<BackwardEngine>); }
TORCH_LIBRARY_IMPL(fastdense_meta, Meta, m) { m.impl("_dense_block_backward", &dense_block_backward<BackwardEngine>); }

}  // namespace fastdense

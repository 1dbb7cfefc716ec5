// SPDX-License-Identifier: Apache-2.0
// Backward of the dense block on a CUDA device.  Layers in reverse; `gradient_` collects scale * dy of all consumers,
// and shift_sum_, slope_sum_ the norm corrections, until a slice is finalised.
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/zeros.h>

#include "dense_block/dense_block_cuda.h"

namespace fastdense {
namespace {

template <typename T>
class Backward : CudaBlock<T> {
  using Base = CudaBlock<T>;
  using Base::args, Base::cuda, Base::ld, Base::pixels;
  using typename Base::A;

 public:
  Backward(const DenseBlockArgs& args, const DenseBlockSaved& saved, const std::optional<at::Tensor>& seed,
           const std::vector<bool>& needs, at::TensorList weights, const CudaContext& cuda)
      : Base(args, saved.buffer.options(), seed, cuda),
        needs_(needs),
        weights_(weights),
        x_(this->const_data(saved.buffer)),
        mean_(saved.mean.const_data_ptr<A>()),
        var_(saved.var.const_data_ptr<A>()),
        z_(saved.z),
        grads_(needs.size()) {
    for (at::Tensor& grad : grads_) grad = at::empty({0}, this->options);
  }

  std::vector<at::Tensor> run(const at::Tensor& grad_output) {
    const int64_t lowest = args.lowest_layer(needs_);
    this->pack_weights(lowest);
    gradient_ = empty_channels_last(args.sizes(ld), this->options);
    g_ = this->data(gradient_);
    corrections_ = at::zeros({2, ld}, this->options.dtype(at::kDouble));
    shift_sum_ = corrections_.template mutable_data_ptr<double>();
    slope_sum_ = shift_sum_ + ld;
    if (args.tail == Tail::kNone) gradient_.copy_(grad_output);
    if (args.tail == Tail::kTransition) transition(to_channels_last(grad_output));
    if (args.tail == Tail::kNorm || args.tail == Tail::kNormRelu) last_norm(to_channels_last(grad_output));
    for (int64_t l = int64_t(args.layers.size()) - 1; l >= lowest; --l) layer(l);
    if (needs_[0]) input();
    return grads_;
  }

 private:
  bool needs(int64_t weight) const { return needs_[size_t(weight) + 1]; }
  void set(int64_t weight, const at::Tensor& value) {
    if (!needs(weight)) return;
    const at::Tensor& like = weights_[size_t(weight)];
    grads_[size_t(weight) + 1] = value.reshape(like.sizes()).to(like.scalar_type()).contiguous();
  }

  struct Sums {
    at::Tensor dweight, dbias;  // [n]
  };
  // Adds up the partial sums of a norm's gradient; `deferred` says that the norm is one of the buffer's consumers.
  Sums finalise(const NormArgs& args_of, const NormParams<A>& norm, const at::Tensor& partial, bool deferred) {
    const int64_t n = partial.size(2);
    const Sums s{this->numbers({n}), this->numbers({n})};
    const bool correct = deferred && !args_of.frozen();
    check_launch(
        launch_finalise_sums<A>({this->sums(partial), partial.size(0), norm, this->sums(s.dweight), this->sums(s.dbias),
                                 correct ? shift_sum_ : nullptr, correct ? slope_sum_ : nullptr, 1.0 / double(pixels)},
                                n, cuda.stream));
    if (args_of.weight.defined()) set(args_of.at, s.dweight);
    if (args_of.bias.defined()) set(args_of.at + 1, s.dbias);
    return s;
  }

  // left^T * right over pixels, in the type of sums: the library may add partial sums of 16-bit results in 16 bits.
  at::Tensor over_pixels(const at::Tensor& left, const at::Tensor& right) const {
    if (left.scalar_type() == this->accumulate()) return at::mm(left.t(), right);
    if (left.is_cuda()) return at::mm(left.t(), right, this->accumulate());
    return at::mm(left.t().to(this->accumulate()), right.to(this->accumulate()));  // hosts know no such product
  }
  static void add(at::Tensor& total, const at::Tensor& part) { total = total.defined() ? total.add_(part) : part; }

  // The tail is the first to write the gradient: it need not be cleared before.
  AccumulateParams<T> consume(const NormParams<A>& norm, Matrix<T> dy, int64_t row, A* partial) const {
    return {{x_ + row * ld, ld}, dy, {g_ + row * ld, ld}, norm, partial, true, false, false};
  }

  void transition(const at::Tensor& grad) {
    const int64_t images = args.batch, area = args.conv.pixels(), pooled = args.pool.pixels();
    // Whole images, so that no window is cut.
    const int64_t step = std::max<int64_t>(1, this->chunk_rows(images * pooled, ld) / pooled);
    const int64_t chunks = (images + step - 1) / step, splits = this->splits(std::min(step, images) * area, ld);
    const NormParams<A> norm = this->norm_params(args.tail_norm, mean_, var_);
    const at::Tensor partial = this->numbers({chunks * splits, 2, ld});
    const at::Tensor rows = grad.movedim(1, -1).reshape({images * pooled, grad.size(1)});
    const at::Tensor y = this->scratch(std::min(step, images) * pooled, ld);
    at::Tensor dweight;
    this->for_each_chunk(images, step, [&](int64_t image, int64_t count, int64_t chunk) {
      const at::Tensor left = rows.narrow(0, image * pooled, count * pooled);
      at::Tensor right = y.narrow(0, 0, count * pooled);
      if (needs(args.tail_conv.at)) {
        this->sweep(launch_activate_pooled<T>, {{x_, ld}, this->matrix(y), norm, args.pool, image * pooled},
                    count * pooled, ld);
        add(dweight, over_pixels(left, right));
      }
      at::mm_out(right, left, this->tail_conv());
      check_launch(launch_accumulate_pooled<T>(
          consume(norm, this->matrix(y), image * area, this->sums(partial) + 2 * chunk * splits * ld), args.pool,
          count * area, ld, splits, cuda.stream));
    });
    if (dweight.defined()) set(args.tail_conv.at, dweight);
    finalise(args.tail_norm, norm, partial, true);
  }

  void last_norm(const at::Tensor& grad) {
    const NormParams<A> norm = this->norm_params(args.tail_norm, mean_, var_);
    const at::Tensor partial = this->numbers({this->splits(pixels, ld), 2, ld});
    AccumulateParams<T> p = consume(norm, {this->data(grad), ld}, 0, this->sums(partial));
    p.relu = args.tail == Tail::kNormRelu;
    this->sweep(launch_accumulate<T>, p, pixels, ld);
    finalise(args.tail_norm, norm, partial, true);
  }

  // Gradient of the channels [first, first + n), whose consumers are done, into a packed image.
  void finalised(int64_t first, int64_t n, const DropoutParams& dropout, const at::Tensor& to) {
    this->sweep(launch_slice_gradient<T>,
                {{g_ + first, ld},
                 {x_ + first, ld},
                 {this->data(to), n},
                 mean_ + first,
                 shift_sum_ + first,
                 slope_sum_ + first,
                 dropout},
                pixels, n);
  }

  void input() {
    grads_[0] = empty_channels_last(args.sizes(args.in_channels), this->options);
    finalised(0, args.in_channels, {}, grads_[0]);
  }

  void layer(int64_t l) {
    const LayerArgs& layer = args.layers[size_t(l)];
    const NormParams<A> norm1 = this->norm_params(layer.norm1, mean_, var_);
    const at::Tensor d = this->packed_image(args.growth);
    finalised(layer.channels, args.growth, this->dropout(l), d);
    if (!args.bottleneck) {
      const at::Tensor y = this->activated_image(x_, ld, norm1, layer.channels);
      const at::Tensor dy = convolution(l, d, y);
      const at::Tensor partial = this->numbers({this->splits(pixels, layer.channels), 2, layer.channels});
      AccumulateParams<T> p = consume(norm1, {this->data(dy), layer.channels}, 0, this->sums(partial));
      p.add = true;
      this->sweep(launch_accumulate<T>, p, pixels, layer.channels);
      finalise(layer.norm1, norm1, partial, true);
      return;
    }
    const at::Tensor z = bottleneck(l, norm1);
    const int64_t at = args.norm2_statistics(l), b = args.width;
    const NormParams<A> norm2 = this->norm_params(layer.norm2, mean_ + at, var_ + at);
    const at::Tensor du = convolution(l, d, this->activated_image(this->const_data(z), b, norm2, b));
    const Matrix<T> dz{this->data(du), b};
    const Matrix<const T> from{this->const_data(z), b};
    const at::Tensor partial = this->numbers({this->splits(pixels, b), 2, b});
    this->sweep(launch_mask_reduce<T>, {{dz.data, b}, from, norm2, this->sums(partial)}, pixels, b);
    const Sums t = finalise(layer.norm2, norm2, partial, false);
    const A inv_count = layer.norm2.frozen() ? A(0) : A(1.0 / double(pixels));
    this->sweep(launch_input_gradient<T>, {dz, from, norm2, this->sums(t.dbias), this->sums(t.dweight), inv_count},
                pixels, b);
    product(l, norm1, du.movedim(1, -1).reshape({pixels, b}));
  }

  // The kept output of the 1x1, or the same made again.
  at::Tensor bottleneck(int64_t l, const NormParams<A>& norm1) {
    if (z_.size(0) > 0) return z_[l];
    if (!z_again_.defined()) z_again_ = at::empty({pixels, args.width}, this->options);
    this->make_bottleneck(l, x_, norm1, z_again_);
    return z_again_;
  }

  // Gradient of the input u of conv2, packed; that of its weight goes to its place.
  at::Tensor convolution(int64_t l, const at::Tensor& d, const at::Tensor& u) {
    const ConvArgs& conv2 = args.layers[size_t(l)].conv2;
    const std::vector<int64_t> padding = this->half_kernel(), ones(padding.size(), 1), zeros(padding.size(), 0);
    const auto [du, dweight, none] = at::convolution_backward(d, u, this->conv2(l), c10::nullopt, ones, padding, ones,
                                                              false, zeros, 1, {true, needs(conv2.at), false});
    if (needs(conv2.at)) set(conv2.at, dweight);
    return to_channels_last(du);
  }

  // Backward of the 1x1 with the gradient dz [pixels, b] of its output, and of the norm and ReLU in front of it.
  void product(int64_t l, const NormParams<A>& norm1, const at::Tensor& dz) {
    const LayerArgs& layer = args.layers[size_t(l)];
    const int64_t c = layer.channels, step = this->chunk_rows(pixels, c);
    const int64_t splits = this->splits(std::min(step, pixels), c), chunks = (pixels + step - 1) / step;
    const at::Tensor partial = this->numbers({chunks * splits, 2, c});
    const at::Tensor y = this->scratch(std::min(step, pixels), c);
    at::Tensor dweight;
    this->for_each_chunk(pixels, step, [&](int64_t row, int64_t rows, int64_t chunk) {
      const at::Tensor left = dz.narrow(0, row, rows);
      at::Tensor right = y.narrow(0, 0, rows);
      at::mm_out(right, left, this->conv1(l));
      AccumulateParams<T> p = consume(norm1, this->matrix(y), row, this->sums(partial) + 2 * chunk * splits * c);
      p.add = true;
      p.keep_y = needs(layer.conv1.at);
      check_launch(launch_accumulate<T>(p, rows, c, splits, cuda.stream));
      if (p.keep_y) add(dweight, over_pixels(left, right));
    });
    if (dweight.defined()) set(layer.conv1.at, dweight);
    finalise(layer.norm1, norm1, partial, true);
  }

  const std::vector<bool>& needs_;
  const at::TensorList weights_;
  const T* const x_;
  const A *const mean_, *const var_;
  const at::Tensor z_;
  at::Tensor z_again_, gradient_, corrections_;
  T* g_ = nullptr;
  double *shift_sum_ = nullptr, *slope_sum_ = nullptr;
  std::vector<at::Tensor> grads_;
};

}  // namespace

template <typename T>
std::vector<at::Tensor> dense_block_backward_cuda(const DenseBlockArgs& args, const DenseBlockSaved& saved,
                                                  const at::Tensor& grad_output, const std::optional<at::Tensor>& seed,
                                                  const std::vector<bool>& needs, at::TensorList weights,
                                                  const CudaContext& cuda) {
  return Backward<T>(args, saved, seed, needs, weights, cuda).run(grad_output);
}

#define FASTDENSE_BACKWARD(T)                                                                             \
  template std::vector<at::Tensor> dense_block_backward_cuda<T>(                                          \
      const DenseBlockArgs&, const DenseBlockSaved&, const at::Tensor&, const std::optional<at::Tensor>&, \
      const std::vector<bool>&, at::TensorList, const CudaContext&);
FASTDENSE_BACKWARD(float)
FASTDENSE_BACKWARD(double)
FASTDENSE_BACKWARD(bfloat16)
FASTDENSE_BACKWARD(half)
#undef FASTDENSE_BACKWARD

}  // namespace fastdense

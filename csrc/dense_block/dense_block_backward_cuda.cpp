// SPDX-License-Identifier: Apache-2.0
// Backward of the dense block of batch norms with ReLU and without bias on a CUDA device; others are passed on.  Layers
// in reverse; `gradient_` collects scale * dy of all consumers, and shift_sum_, slope_sum_ the norm corrections, until
// a slice is finalised.
#include <ATen/ops/zeros.h>

#include "cuda/block_backward.h"
#include "dense_block/dense_block_cuda.h"
#include "dense_block/dense_block_general_cuda.h"

namespace fastdense {
namespace {

template <typename T>
class Backward : CudaBlock<T> {
  using Base = CudaBlock<T>;
  using Base::args, Base::cuda, Base::ld, Base::pixels, Base::plans;
  using typename Base::A, typename Base::Bottleneck;
  using Gradients = CudaBlockBackward<T>;

 public:
  Backward(const DenseBlockArgs& args, const DenseBlockSaved& saved, const std::optional<at::Tensor>& seed,
           const std::vector<bool>& needs, at::TensorList weights, const CudaContext& cuda)
      : Base(args, saved.buffer.options(), seed, cuda),
        needs_(needs),
        grads_(*this, needs, weights),
        x_(this->const_data(saved.buffer)),
        mean_(saved.mean.const_data_ptr<A>()),
        var_(saved.var.const_data_ptr<A>()),
        z_(saved.z) {}

  std::vector<at::Tensor> run(const at::Tensor& grad_output) {
    const int64_t lowest = args.lowest_layer(needs_);
    this->pack_weights(lowest, true);
    gradient_ = empty_channels_last(args.sizes(ld), this->options);
    g_ = this->data(gradient_);
    corrections_ = at::zeros({2, ld}, this->options.dtype(at::kDouble));
    shift_sum_ = corrections_.template mutable_data_ptr<double>();
    slope_sum_ = shift_sum_ + ld;
    if (args.tail == Tail::kNone) gradient_.copy_(grad_output);
    if (args.tail == Tail::kTransition) transition(to_channels_last(grad_output));
    if (args.tail == Tail::kNorm || args.tail == Tail::kNormRelu) last_norm(to_channels_last(grad_output));
    for (int64_t l = int64_t(args.layers.size()) - 1; l >= lowest; --l)
      if (!args.layers[size_t(l)].dropped) layer(l);
    for (at::Tensor* of_layers : {&z_again_, &d_, &dv_}) of_layers->reset();
    if (grads_.needs_input()) input();
    return grads_.take();
  }

 private:
  CudaCorrections corrections() const { return {shift_sum_, slope_sum_}; }

  // The channels [0, c) of the buffer.  The tail is the first to write the gradient: it need not be cleared before.
  typename Gradients::Segment prefix(int64_t c, bool add) const {
    return {{x_, ld}, {g_, ld}, 0, c, corrections(), add};
  }

  void transition(const at::Tensor& grad) {
    const at::Tensor rows = grad.movedim(1, -1).reshape({args.batch * args.pool.pixels(), grad.size(1)});
    grads_.pooled_conv1x1_backward(args.tail_conv, this->tail_conv(), args.tail_norm,
                                   this->norm_params(args.tail_norm, mean_, var_), args.pool, args.batch, rows,
                                   prefix(ld, false));
  }

  void last_norm(const at::Tensor& grad) { consume(args.tail_norm, grad, ld, args.tail == Tail::kNormRelu, false); }

  // Backward of a norm, and the ReLU behind it, that reads the channels [0, c) of the buffer.
  void consume(const NormArgs& norm, const at::Tensor& dy, int64_t c, bool relu, bool add) {
    const NormParams<A> params = this->norm_params(norm, mean_, var_);
    const typename Base::Partials partial = this->partials(pixels, c);
    this->reduction(launch_accumulate<T>,
                    {{x_, ld}, {this->data(dy), c}, {g_, ld}, params, partial.of_chunk(0), relu, false, add}, pixels,
                    c);
    const typename Gradients::Sums sums = grads_.sums(c);
    grads_.finalise(norm, params, partial.all(), pixels, corrections(), sums);
    grads_.set_norm(norm, sums);
  }

  // Gradient of the channels [first, first + n), whose consumers are done, into a packed image.
  void finalised(int64_t first, int64_t n, const DropoutParams& dropout, const at::Tensor& to) {
    this->sync.means(corrections_, 1, first, n, pixels);
    this->reduction(launch_slice_gradient<T>,
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
    const at::Tensor to = empty_channels_last(args.sizes(args.in_channels), this->options);
    finalised(0, args.in_channels, {}, to);
    grads_.set_input(to);
  }

  void layer(int64_t l) {
    const LayerArgs& layer = args.layers[size_t(l)];
    const NormParams<A> norm1 = this->norm_params(layer.norm1, mean_, var_);
    if (!d_.defined()) d_ = this->packed_image(args.growth);
    finalised(layer.channels, args.growth, this->dropout(l), d_);
    if (!args.bottleneck) {
      const at::Tensor y = this->activated_image({x_, ld}, norm1, layer.channels);
      return consume(layer.norm1, convolution(l, y), layer.channels, true, true);
    }
    const Matrix<const T> z = this->rows_of(bottleneck(l, norm1));
    const int64_t at = args.norm2_statistics(l);
    const NormParams<A> norm2 = this->norm_params(layer.norm2, mean_ + at, var_ + at);
    const at::Tensor dz = plans ? fused_convolution(l, z, norm2) : library_convolution(l, z, norm2);
    grads_.conv1x1_backward(layer.conv1, this->conv1(l), layer.norm1, norm1, dz, {prefix(layer.channels, true)});
  }

  // The saved output of the 1x1, or the same recomputed.
  Bottleneck bottleneck(int64_t l, const NormParams<A>& norm1) {
    if (z_.size(0) > 0) return {z_, args.layers[size_t(l)].z_index};
    if (!z_again_.defined()) z_again_ = at::empty({pixels, args.width}, this->options);
    this->make_bottleneck(l, x_, norm1, {z_again_});
    return {z_again_};
  }

  // Gradient of z [pixels, b] from that of the slice; those of conv2 and norm2 go to their places.
  at::Tensor fused_convolution(int64_t l, const Matrix<const T>& z, const NormParams<A>& norm2) {
    const LayerArgs& layer = args.layers[size_t(l)];
    if (!dv_.defined()) dv_ = at::empty({pixels, args.width}, this->options);
    const T* d = this->const_data(d_);
    const PartialSums<A> partial =
        fused_conv_input_gradient<T>(*this, plans.input_gradient, d, this->conv2(l), z.data, norm2, this->data(dv_));
    WeightSum<A> dweight;
    if (grads_.needs(layer.conv2.at))
      dweight = fused_conv_weight_gradient<T>(*this, plans.weight_gradient, d, z.data, norm2, layer.conv2.weight);
    grads_.norm_backward(layer.norm2, norm2, partial, this->matrix(dv_), z, pixels, args.width, dweight.params);
    if (dweight.to.defined()) grads_.set(layer.conv2.at, dweight.to);
    return dv_;
  }
  at::Tensor library_convolution(int64_t l, const Matrix<const T>& z, const NormParams<A>& norm2) {
    const int64_t b = args.width;
    const at::Tensor du = convolution(l, this->activated_image(z, norm2, b));
    grads_.norm_backward(args.layers[size_t(l)].norm2, norm2, {this->data(du), b}, z, pixels, b);
    return du.movedim(1, -1).reshape({pixels, b});
  }

  // Gradient of the input u of conv2, packed; that of its weight goes to its place.
  at::Tensor convolution(int64_t l, const at::Tensor& u) {
    const ConvArgs& conv2 = args.layers[size_t(l)].conv2;
    const auto [du, dweight] = this->convolution_gradients(l, d_, u, grads_.needs(conv2.at));
    if (grads_.needs(conv2.at)) grads_.set(conv2.at, dweight);
    return du;
  }

  const std::vector<bool>& needs_;
  Gradients grads_;
  const T* const x_;
  const A *const mean_, *const var_;
  const at::Tensor z_;
  at::Tensor gradient_, corrections_;
  at::Tensor z_again_, d_, dv_;  // of one layer at a time: z and its gradient [pixels, b], the gradient of the slice
  T* g_ = nullptr;
  double *shift_sum_ = nullptr, *slope_sum_ = nullptr;
};

}  // namespace

template <typename T>
std::vector<at::Tensor> dense_block_backward_cuda(const DenseBlockArgs& args, const DenseBlockSaved& saved,
                                                  const at::Tensor& grad_output, const std::optional<at::Tensor>& seed,
                                                  const std::vector<bool>& needs, at::TensorList weights,
                                                  const CudaContext& cuda) {
  if (args.has_extras()) return GeneralBackward<T>(args, saved, seed, needs, weights, cuda).run(grad_output);
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

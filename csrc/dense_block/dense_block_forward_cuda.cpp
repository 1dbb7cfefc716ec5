// SPDX-License-Identifier: Apache-2.0
// Forward of the dense block of batch norms with ReLU and without bias on a CUDA device; others are passed on.
#include "dense_block/dense_block_cuda.h"
#include "dense_block/dense_block_general_cuda.h"

namespace fastdense {
namespace {

template <typename T>
class Forward : CudaBlock<T> {
  using Base = CudaBlock<T>;
  using Base::args, Base::cuda, Base::ld, Base::pixels, Base::plans;
  using typename Base::A, typename Base::Bottleneck;

 public:
  Forward(const DenseBlockArgs& args, const at::Tensor& input, const std::optional<at::Tensor>& seed,
          const DenseBlockOutputs& o, const CudaContext& cuda)
      : Base(args, input.options(), seed, cuda),
        x_(this->data(o.buffer)),
        mean_(this->sums(o.mean)),
        var_(this->sums(o.var)),
        z_(o.z) {}

  void run(const at::Tensor& input, const DenseBlockOutputs& o) {
    this->pack_weights(0, false);
    take_in(to_channels_last(input));
    for (size_t l = 0; l < args.layers.size(); ++l)
      if (!args.layers[l].dropped) layer(int64_t(l));
    if (args.tail == Tail::kTransition) transition(o.out);
    if (args.tail == Tail::kNorm || args.tail == Tail::kNormRelu) last_norm(o.out);
  }

 private:
  void take_in(const at::Tensor& input) {
    append({this->const_data(input), args.in_channels}, 0, args.in_channels, {});
  }

  void layer(int64_t l) {
    const LayerArgs& layer = args.layers[size_t(l)];
    const NormParams<A> norm1 = this->norm_params(layer.norm1, mean_, var_);
    if (!args.bottleneck) return convolution(l, this->activated_image({x_, ld}, norm1, layer.channels));
    const int64_t at = args.norm2_statistics(l), b = args.width;
    const bool wanted = !layer.norm2.frozen(), saved = z_.size(0) > 0;
    if (!plans && !wanted && !saved && !args.recompute) {
      // Nothing needs z itself, as in inference; backward recomputes it.  A fused convolution reads z.
      const at::Tensor u = this->packed_image(b);
      const Matrix<T> rows{this->data(u), b};
      if (fuses_conv1x1<T>(cuda, {x_, ld}, this->conv1(l), rows, pixels)) {
        const NormParams<A> norm2 = this->norm_params(layer.norm2, nullptr, nullptr);
        conv1x1<T>(*this, {x_, ld}, norm1, this->conv1(l), rows, pixels, {}, norm2);
        return convolution(l, u);
      }
    }
    if (!saved && !one_z_.defined()) one_z_ = at::empty({pixels, b}, this->options);
    const Bottleneck z = saved ? Bottleneck{z_, layer.z_index} : Bottleneck{one_z_};
    this->make_bottleneck(l, x_, norm1, z, statistics_from(at, wanted));
    const NormParams<A> norm2 = this->norm_params(layer.norm2, mean_ + at, var_ + at);
    if (!plans) return convolution(l, this->activated_image(this->rows_of(z), norm2, b));
    fused_conv<T>(*this, plans.forward, this->rows_of(z).data, norm2, this->conv2(l), {x_ + layer.channels, ld},
                  this->dropout(l), statistics_from(layer.channels, args.any_batch_statistics()));
  }

  BatchStatistics<A> statistics_from(int64_t first, bool wanted) const {
    return wanted ? BatchStatistics<A>{mean_ + first, var_ + first} : BatchStatistics<A>{};
  }

  // The slice of layer l = dropout(conv2(u)).
  void convolution(int64_t l, const at::Tensor& u) {
    const at::Tensor features = this->convolved(l, u);
    append({this->const_data(features), args.growth}, args.layers[size_t(l)].channels, args.growth, this->dropout(l));
  }

  // Channels [first, first + n) of the buffer, with their statistics.
  void append(const Matrix<const T>& features, int64_t first, int64_t n, const DropoutParams& dropout) {
    const bool wanted = args.any_batch_statistics();
    const typename Base::Partials partial = this->partials(pixels, n);
    this->reduction(launch_slice_in<T>,
                    {features, {x_ + first, ld}, dropout, wanted ? partial.of_chunk(0) : nullptr, {}, nullptr}, pixels,
                    n);
    if (wanted) this->finalise_moments(partial, x_ + first, pixels, statistics_from(first, wanted));
  }

  void transition(const at::Tensor& out) {
    const int64_t rows = args.batch * args.pool.pixels(), step = this->chunk_rows(rows, ld);
    const NormParams<A> norm = this->norm_params(args.tail_norm, mean_, var_);
    const at::Tensor y = this->workspace(std::min(step, rows), ld);
    const at::Tensor to = out.movedim(1, -1).reshape({rows, out.size(1)});
    this->for_each_chunk(rows, step, [&](int64_t row, int64_t count, int64_t) {
      this->reduction(launch_activate_pooled<T>, {{x_, ld}, this->matrix(y), norm, args.pool, row}, count, ld);
      at::Tensor chunk = to.narrow(0, row, count);
      at::mm_out(chunk, y.narrow(0, 0, count), this->tail_conv().t());
    });
  }

  void last_norm(const at::Tensor& out) {
    this->reduction(
        launch_activate<T>,
        {{x_, ld}, {this->data(out), ld}, this->norm_params(args.tail_norm, mean_, var_), args.tail == Tail::kNormRelu},
        pixels, ld);
  }

  T* const x_;
  A *const mean_, *const var_;
  const at::Tensor z_;
  at::Tensor one_z_;
};

}  // namespace

template <typename T>
void dense_block_forward_cuda(const DenseBlockArgs& args, const at::Tensor& input,
                              const std::optional<at::Tensor>& seed, const DenseBlockOutputs& o,
                              const CudaContext& cuda) {
  if (args.has_extras()) return GeneralForward<T>(args, input, seed, o, cuda).run(input, o);
  Forward<T>(args, input, seed, o, cuda).run(input, o);
}

#define FASTDENSE_FORWARD(T)                                                                            \
  template void dense_block_forward_cuda<T>(const DenseBlockArgs&, const at::Tensor&,                   \
                                            const std::optional<at::Tensor>&, const DenseBlockOutputs&, \
                                            const CudaContext&);
FASTDENSE_FORWARD(float)
FASTDENSE_FORWARD(double)
FASTDENSE_FORWARD(bfloat16)
FASTDENSE_FORWARD(half)
#undef FASTDENSE_FORWARD

}  // namespace fastdense

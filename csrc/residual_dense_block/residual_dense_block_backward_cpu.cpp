// SPDX-License-Identifier: Apache-2.0
// Backward of the residual dense block on the CPU.  The fusion first, then layers in reverse; sums and weight gradients
// are kept per worker and added in order, so reruns with the same number of threads are bit-identical.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/block_backward.h"
#include "residual_dense_block/residual_dense_block_cpu.h"

namespace fastdense {
namespace {

template <typename T>
class Backward : BlockBackward<T> {
  using Base = BlockBackward<T>;
  using A = typename Base::A;

 public:
  Backward(const ResidualDenseBlockArgs& args, const at::Tensor& buffer, const std::vector<bool>& needs,
           at::TensorList weights)
      : Base(needs, weights, buffer.options(), 1),
        args_(args),
        lowest_layer_(args.lowest_layer(needs)),
        convolution_(args, *this),
        x_(static_cast<const T*>(buffer.const_data_ptr())),
        ld_(args.channels()) {
    int64_t most = 0;
    for (const ResidualLayerArgs& layer : args.layers)
      most = std::max(most, convolution_.kernels.conv_backward_bytes(layer.out, layer.geometry, tiles(layer).first));
    this->reserve_workspace(1, 1, most);
  }

  // grad: of the block's output, channels innermost.
  std::vector<at::Tensor> run(const at::Tensor& grad) {
    if (lowest_layer_ == int64_t(args_.layers.size())) return this->grads();
    at::Tensor gradient = with_huge_pages(empty_channels_last(args_.sizes(ld_), this->options()));
    g_ = static_cast<T*>(gradient.mutable_data_ptr());
    if (!args_.fusion) gradient.copy_(grad);
    const T* dy = args_.fusion ? static_cast<const T*>(grad.const_data_ptr()) : nullptr;
    for (int64_t l = int64_t(args_.layers.size()) - 1; l >= lowest_layer_; --l)
      layer(l, args_.is_fusion(size_t(l)) ? dy : nullptr);
    if (this->needs_input()) input(gradient, dy);
    return this->grads();
  }

 private:
  // The kernel keeps a panel of the prefix and one of its gradient beside the layer's own.
  auto tiles(const ResidualLayerArgs& layer) const { return convolution_.tiles(layer.out + 2 * this->kernels.panel); }

  void layer(int64_t l, const T* grad_output) {
    const ResidualLayerArgs& layer = args_.layers[l];
    // the fusion's sums from the block's gradient, those of others from their slice
    const SumsGradient<T> d =
        grad_output ? SumsGradient<T>{grad_output, layer.out, nullptr, 0, layer.out, A(args_.scale * args_.outer_scale)}
                    : SumsGradient<T>{g_ + layer.end(), ld_, x_ + layer.end(), ld_, layer.out, A(args_.negative_slope)};
    const bool wants_prefix = l > lowest_layer_ || this->needs_input();
    const bool needs_weight = this->needs(layer.conv.at), needs_bias = this->needs(layer.bias.at);
    const at::Tensor panels = convolution_.pack(layer, true);
    const at::Tensor dweight = this->worker_gradients(
        needs_weight, convolution_.kernels.products(layer.geometry) * this->padded_depth(layer.out), layer.channels);
    const at::Tensor dbias =
        at::zeros({needs_bias ? this->workers : 0, layer.out}, at::TensorOptions().dtype(at::kDouble));
    convolution_.for_each_tile(tiles(layer), [&](int64_t worker, const Tile& tile) {
      const ConvGradients<T> to{wants_prefix ? g_ + layer.first : nullptr, grad_output == nullptr,
                                this->of_worker(dweight, worker),
                                needs_bias ? dbias.mutable_data_ptr<double>() + worker * layer.out : nullptr};
      convolution_.kernels.conv_backward(d, {x_ + layer.first, ld_, layer.channels}, layer.geometry, tile,
                                         this->panels_of(panels), to, this->workspace(worker));
    });
    if (needs_bias) this->set(layer.bias.at, dbias.sum(0));
    if (needs_weight) this->set(layer.conv.at, convolution_.weight_gradient(layer, dweight));
  }

  void input(const at::Tensor& gradient, const T* grad_output) {
    const int64_t n = args_.in_channels;
    at::Tensor& dx = this->grads()[0];
    dx = empty_channels_last(args_.sizes(n), this->options());
    if (!args_.fusion) return (void)dx.copy_(gradient.narrow(1, 0, n));
    T* out = static_cast<T*>(dx.mutable_data_ptr());
    this->share_chunks(
        args_.pixels(), 4 * this->kernels.backward_rows, [&](int64_t, int64_t, int64_t, int64_t row, int64_t rows) {
          convolution_.kernels.input_gradient(g_, ld_, grad_output, row, rows, n, A(args_.outer_scale), out);
        });
  }

  const ResidualDenseBlockArgs& args_;
  const int64_t lowest_layer_;
  const ResidualConvolution<T> convolution_;
  const T* const x_;
  const int64_t ld_;
  T* g_ = nullptr;
};

struct BackwardEngine {
  using Guard = c10::Device;  // nothing to guard
  template <typename T>
  static std::vector<at::Tensor> backward(const ResidualDenseBlockArgs& args, const at::Tensor& buffer,
                                          const at::Tensor& grad_output, const std::vector<bool>& needs,
                                          at::TensorList weights) {
    return Backward<T>(args, buffer, needs, weights).run(grad_output);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) {
  m.impl("_residual_dense_block_backward", &residual_dense_block_backward<BackwardEngine>);
}
TORCH_LIBRARY_IMPL(fastdense_meta, Meta, m) {
  m.impl("_residual_dense_block_backward", &residual_dense_block_backward<BackwardEngine>);
}

}  // namespace fastdense

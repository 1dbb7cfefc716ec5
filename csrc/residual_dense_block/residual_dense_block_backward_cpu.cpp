// SPDX-License-Identifier: Apache-2.0
// Backward of the residual dense block on the CPU.  The fusion first, then layers in reverse; sums and weight gradients
// are kept per worker and added in order, so reruns with the same number of threads are bit-identical.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/huge_pages.h"
#include "common/row_gradients.h"
#include "residual_dense_block/residual_dense_block_driver.h"

namespace fastdense {
namespace {

template <typename T>
class Backward : RowGradients<T> {
  using Base = RowGradients<T>;
  using A = typename Base::A;

 public:
  Backward(const ResidualDenseBlockArgs& args, const at::Tensor& buffer, const std::vector<bool>& needs,
           at::TensorList weights)
      : Base(needs, weights, buffer.options(), 1),
        args_(args),
        convolution_(args, *this),
        x_(static_cast<const T*>(buffer.const_data_ptr())),
        ld_(args.channels()) {
    int64_t most = 0;
    for (const ResidualLayerArgs& layer : args.layers)
      most = std::max(most, convolution_.kernels.conv_backward_bytes(layer.out, layer.geometry, tiles(layer).first));
    this->reserve_scratch(1, 1, most);
  }

  // grad: of the block's output, channels innermost.
  std::vector<at::Tensor> run(const at::Tensor& grad) {
    const int64_t lowest = lowest_layer();
    if (lowest == int64_t(args_.layers.size())) return this->grads();
    at::Tensor gradient = with_huge_pages(empty_channels_last(args_.sizes(ld_), this->options()));
    g_ = static_cast<T*>(gradient.mutable_data_ptr());
    const T* dy = static_cast<const T*>(grad.const_data_ptr());
    const int64_t last = int64_t(args_.layers.size()) - 1;
    for (int64_t l = last; l >= lowest; --l) layer(l, l == last ? dy : nullptr, l > lowest || this->needs_input());
    if (this->needs_input()) input(dy);
    return this->grads();
  }

 private:
  // Layers below the lowest one with a parameter or input that needs a gradient are left out.
  int64_t lowest_layer() const {
    int64_t l = 0;
    while (!this->needs_input() && l < int64_t(args_.layers.size()) && !this->needs(2 * l) && !this->needs(2 * l + 1))
      ++l;
    return l;
  }

  // The kernel keeps a panel of the prefix and one of its gradient beside the layer's own.
  auto tiles(const ResidualLayerArgs& layer) const { return convolution_.tiles(layer.out + 2 * this->kernels.panel); }

  void layer(int64_t l, const T* grad_output, bool wants_prefix) {
    const ResidualLayerArgs& layer = args_.layers[l];
    // the fusion's sums from the block's gradient, those of others from their slice
    const SumsGradient<T> d =
        grad_output
            ? SumsGradient<T>{grad_output, layer.out, nullptr, 0, layer.out, A(args_.scale * args_.outer_scale)}
            : SumsGradient<T>{g_ + layer.channels, ld_, x_ + layer.channels, ld_, layer.out, A(args_.negative_slope)};
    const bool needs_weight = this->needs(layer.conv.at), needs_bias = this->needs(layer.bias.at);
    const at::Tensor panels = convolution_.pack(layer, true);
    const at::Tensor dweight = this->worker_gradients(
        needs_weight, convolution_.kernels.products(layer.geometry) * this->padded_depth(layer.out), layer.channels);
    const at::Tensor dbias =
        at::zeros({needs_bias ? this->workers : 0, layer.out}, at::TensorOptions().dtype(at::kDouble));
    convolution_.for_each_tile(tiles(layer), [&](int64_t worker, const Tile& tile) {
      const ConvGradients<T> to{wants_prefix ? g_ : nullptr, grad_output == nullptr, this->of_worker(dweight, worker),
                                needs_bias ? dbias.mutable_data_ptr<double>() + worker * layer.out : nullptr};
      convolution_.kernels.conv_backward(d, {x_, ld_, layer.channels}, layer.geometry, tile, this->panels_of(panels),
                                         to, this->scratch(worker));
    });
    if (needs_bias) this->set(layer.bias.at, dbias.sum(0));
    if (needs_weight) this->set(layer.conv.at, convolution_.weight_gradient(layer, dweight));
  }

  void input(const T* grad_output) {
    const int64_t n = args_.in_channels;
    at::Tensor& dx = this->grads()[0];
    dx = empty_channels_last(args_.sizes(n), this->options());
    T* out = static_cast<T*>(dx.mutable_data_ptr());
    this->for_each_chunk(
        args_.pixels(), 4 * this->kernels.backward_rows, [&](int64_t, int64_t, int64_t row, int64_t rows) {
          convolution_.kernels.input_gradient(g_, ld_, grad_output, row, rows, n, A(args_.outer_scale), out);
        });
  }

  const ResidualDenseBlockArgs& args_;
  const ResidualConvolution<T> convolution_;
  const T* const x_;
  const int64_t ld_;
  T* g_ = nullptr;
};

// Gradients of the input and of every weight, empty where `needs_grad` says that none is wanted.  That of `outer` is
// grad_output itself.
std::vector<at::Tensor> residual_dense_block_backward_cpu(const at::Tensor& grad_output,  // [N, C0, H, W]
                                                          const at::Tensor& buffer,       // [N, C, H, W]
                                                          at::TensorList weights, double negative_slope, double scale,
                                                          double outer_scale, int64_t in_channels,
                                                          c10::List<bool> needs_grad) {
  constexpr const char* kOp = "_residual_dense_block_backward";
  check_at_most(kOp, "in_channels", in_channels, buffer.size(1));
  std::vector<int64_t> sizes = buffer.sizes().vec();
  sizes[1] = in_channels;
  const ResidualDenseBlockArgs args =
      parse_residual_dense_block(sizes, buffer.options(), weights, negative_slope, scale, outer_scale);
  check_shape(kOp, "grad_output", grad_output, sizes);
  check_at_least(kOp, "needs_grad", int64_t(needs_grad.size()), int64_t(weights.size()) + 1);
  const std::vector<bool> needs(needs_grad.begin(), needs_grad.end());
  if (args.pixels() == 0) {
    std::vector<at::Tensor> zeros{empty_channels_last(sizes, buffer.options())};
    for (size_t i = 0; i < weights.size(); ++i)
      zeros.push_back(needs[i + 1] ? at::zeros_like(weights[i]) : at::empty({0}, buffer.options()));
    return zeros;
  }
  const at::Tensor grad = to_channels_last(grad_output);
  std::vector<at::Tensor> grads;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, buffer.scalar_type(), kOp, [&] {
    grads = Backward<typename Storage<scalar_t>::type>(args, buffer, needs, weights).run(grad);
  });
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) { m.impl("_residual_dense_block_backward", &residual_dense_block_backward_cpu); }

}  // namespace fastdense

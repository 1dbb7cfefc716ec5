// SPDX-License-Identifier: Apache-2.0
// Forward of the residual dense block on the CPU: the loop over layers, tile by tile.
#include <ATen/Dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/huge_pages.h"
#include "residual_dense_block/residual_dense_block_driver.h"

namespace fastdense {
namespace {

template <typename T>
class Forward : RowDriver<T> {
  using A = typename RowDriver<T>::A;

 public:
  Forward(const ResidualDenseBlockArgs& args, const at::Tensor& buffer)
      : args_(args), convolution_(args, *this), x_(static_cast<T*>(buffer.mutable_data_ptr())), ld_(args.channels()) {
    int64_t most = 0;
    for (const ResidualLayerArgs& layer : args.layers)
      most = std::max(most, convolution_.kernels.conv_bytes(layer.channels, layer.geometry,
                                                            convolution_.tiles(layer.channels).first));
    this->reserve_scratch(1, 1, most);
  }

  void run(const at::Tensor& outer, const at::Tensor& out) {
    for (const ResidualLayerArgs& layer : args_.layers) {
      const bool last = &layer == &args_.fusion();
      const at::Tensor bias = layer.bias.weight.defined()
                                  ? this->accumulate_type(layer.bias.weight)
                                  : at::zeros({layer.out}, at::TensorOptions().dtype(this->kAccumulate));
      Finish<T> finish{x_ + layer.channels,     ld_, layer.out, bias.template const_data_ptr<A>(),
                       A(args_.negative_slope), {},  {}};
      if (last) {
        finish.out = static_cast<T*>(out.mutable_data_ptr());
        finish.ld = layer.out;
        finish.inner = {x_, ld_, A(args_.scale)};
        if (outer.defined())
          finish.outer = {static_cast<const T*>(outer.const_data_ptr()), layer.out, A(args_.outer_scale)};
      }
      conv(layer, finish);
    }
  }

 private:
  void conv(const ResidualLayerArgs& layer, const Finish<T>& finish) {
    const at::Tensor panels = convolution_.pack(layer, false);
    convolution_.for_each_tile(convolution_.tiles(layer.channels), [&](int64_t worker, const Tile& tile) {
      convolution_.kernels.conv({x_, ld_, layer.channels}, layer.geometry, tile, this->panels_of(panels), finish,
                                this->scratch(worker));
    });
  }

  const ResidualDenseBlockArgs& args_;
  const ResidualConvolution<T> convolution_;
  T* const x_;
  const int64_t ld_;
};

std::tuple<at::Tensor, at::Tensor> residual_dense_block_cpu(const at::Tensor& input,  // [N, C0, H, W]
                                                            at::TensorList weights, double negative_slope, double scale,
                                                            const std::optional<at::Tensor>& outer,  // [N, C0, H, W]
                                                            double outer_scale) {
  check_floating("residual_dense_block", "input", input);
  const ResidualDenseBlockArgs args =
      parse_residual_dense_block(input.sizes(), input.options(), weights, negative_slope, scale, outer_scale);
  check_outer(input, outer);
  at::Tensor buffer = with_huge_pages(empty_channels_last(args.sizes(args.channels()), input.options()));
  at::Tensor out = with_huge_pages(empty_channels_last(input.sizes(), input.options()));
  if (args.pixels() == 0) return {out, buffer};
  buffer.narrow(1, 0, args.in_channels).copy_(input);
  const at::Tensor outer_rows = outer.has_value() ? to_channels_last(*outer) : at::Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "residual_dense_block", [&] {
    Forward<typename Storage<scalar_t>::type>(args, buffer).run(outer_rows, out);
  });
  return {out, buffer};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) { m.impl("residual_dense_block", &residual_dense_block_cpu); }

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
// Forward of the residual dense block on the CPU: the loop over layers, tile by tile.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "residual_dense_block/residual_dense_block_cpu.h"

namespace fastdense {
namespace {

template <typename T>
class Forward : BlockForward<T> {
  using A = typename BlockForward<T>::A;

 public:
  Forward(const ResidualDenseBlockArgs& args, const at::Tensor& buffer)
      : args_(args), convolution_(args, *this), x_(static_cast<T*>(buffer.mutable_data_ptr())), ld_(args.channels()) {
    int64_t most = 0;
    for (const ResidualLayerArgs& layer : args.layers)
      most = std::max(most, convolution_.kernels.conv_bytes(layer.channels, layer.geometry,
                                                            convolution_.tiles(layer.channels).first));
    this->reserve_workspace(1, 1, most);
  }

  void run(const at::Tensor& outer, const at::Tensor& out) {
    for (size_t l = 0; l < args_.layers.size(); ++l) {
      const ResidualLayerArgs& layer = args_.layers[l];
      const at::Tensor bias = layer.bias.weight.defined()
                                  ? this->accumulate_type(layer.bias.weight)
                                  : at::zeros({layer.out}, at::TensorOptions().dtype(this->kAccumulate));
      Finish<T> finish{x_ + layer.end(),        ld_, layer.out, bias.template const_data_ptr<A>(),
                       A(args_.negative_slope), {},  {}};
      if (args_.is_fusion(l)) {
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
    convolution_.share_tiles(convolution_.tiles(layer.channels), [&](int64_t worker, const Tile& tile) {
      convolution_.kernels.conv({x_ + layer.first, ld_, layer.channels}, layer.geometry, tile, this->panels_of(panels),
                                finish, this->workspace(worker));
    });
  }

  const ResidualDenseBlockArgs& args_;
  const ResidualConvolution<T> convolution_;
  T* const x_;
  const int64_t ld_;
};

struct ForwardEngine {
  using Guard = c10::Device;  // nothing to guard
  template <typename T>
  static void forward(const ResidualDenseBlockArgs& args, const at::Tensor& outer, const ResidualDenseBlockOutputs& o) {
    Forward<T>(args, o.buffer).run(outer, o.out);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) { m.impl("residual_dense_block", &residual_dense_block<ForwardEngine>); }
TORCH_LIBRARY_IMPL(fastdense_meta, Meta, m) { m.impl("residual_dense_block", &residual_dense_block<ForwardEngine>); }

}  // namespace fastdense

// SPDX-License-Identifier: Apache-2.0
// Weights and their gradients for ops whose table of kernels is made of cpu/conv/conv2d_tile.h: `kernels` has products,
// pack and weight_gradient.
#pragma once

#include "core/geometry.h"
#include "cpu/block_forward.h"

namespace fastdense {

// A weight [k, in, kernel...] in panels: for the convolution, or reversed for the gradient of its input.
template <typename T, typename Kernels>
at::Tensor pack_conv2d_weight(const BlockForward<T>& block, const Kernels& kernels, const ConvGeometry& g,
                              const at::Tensor& conv, bool reversed) {
  const at::Tensor weight = BlockForward<T>::accumulate_type(conv);
  const auto* w = weight.template const_data_ptr<accumulate_t<T>>();
  const int64_t k = conv.size(0), channels = conv.size(1);
  const int64_t in = g.taps(), out = in * channels;  // strides of the channels
  const int64_t depth = reversed ? k : channels, n = reversed ? channels : k;
  const int64_t depth_stride = reversed ? out : in, column_stride = reversed ? in : out;
  const int64_t panel = block.kernels.panel;
  const int64_t bytes = kernels.products(g) * block.padded_depth(depth) * panel * block.kernels.operand_bytes;
  at::Tensor packed = block.bytes(block.padded(n) / panel * bytes);
  uint8_t* to = packed.mutable_data_ptr<uint8_t>();
  block.share_units(block.padded(n) / panel, [&](int64_t, int64_t unit) {
    const int64_t first = unit * panel;
    kernels.pack(w + first * column_stride, g, reversed, depth, n - first, depth_stride, column_stride,
                 to + unit * bytes);
  });
  return packed;
}

// The gradient of a weight from those of the workers [workers, products * padded k, padded channels].
template <typename T, typename Kernels>
at::Tensor sum_conv2d_weight_gradient(const BlockForward<T>& block, const Kernels& kernels, const ConvGeometry& g,
                                      const at::Tensor& conv, const at::Tensor& by_worker) {
  using A = accumulate_t<T>;
  const int64_t k = conv.size(0), n = conv.size(1), ld = by_worker.size(2), per_row = n * g.taps();
  at::Tensor total = BlockForward<T>::template temporary<A>(conv.sizes());
  const A* from = by_worker.template const_data_ptr<A>();
  A* to = total.template mutable_data_ptr<A>();
  block.share_units(k, [&](int64_t, int64_t row) {
    kernels.weight_gradient(from + row * ld, by_worker.size(0), g, k, n, ld, to + row * per_row);
  });
  return total;
}

}  // namespace fastdense

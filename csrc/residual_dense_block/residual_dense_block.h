// SPDX-License-Identifier: Apache-2.0
// Front half of the residual dense block op, shared by all devices.
//
// L layers and one local fusion on a shared buffer [N, C, H, W] with channels innermost, C = c0 + L * k:
//
//   [pixels, C]   |<--- c0 --->|<-k->|<-k->| ... |<-k->|     layer l reads channels [0, c0 + l*k)
//                     input      y_0   y_1         y_L-1     and writes     [c0 + l*k, c0 + (l+1)*k)
//
//   y_l = LeakyReLU(conv3x3(prefix) + bias),  f = conv(all) + bias (3x3 or 1x1),  r = scale * f + input,
//   and the result is r, or outer_scale * r + outer.
//
// The buffer is allocated by the forward op and is all that is saved for backward: the sign that LeakyReLU needs is
// that of its output.  Backward owns a gradient buffer of the same layout, to which every layer adds the gradient of
// its prefix; a slice is read when all layers behind it are done.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "common/layout.h"
#include "common/weights.h"
#include "residual_dense_block/residual_dense_block_kernels.h"

namespace fastdense {

struct ResidualLayerArgs {
  ConvArgs conv, bias;    // [k, channels, 3, 3] or the fusion's [c0, C, 1 or 3, ...]; [k] or undefined
  ConvGeometry geometry;  // of the image, and the kernel
  int64_t channels = 0;   // of the prefix that it reads
  int64_t out = 0;        // channels that it makes
};

struct ResidualDenseBlockArgs {
  std::vector<ResidualLayerArgs> layers;  // the fusion is the last
  int64_t batch = 0, in_channels = 0, height = 0, width = 0;
  double negative_slope = 0, scale = 1, outer_scale = 1;

  const ResidualLayerArgs& fusion() const { return layers.back(); }
  int64_t channels() const { return fusion().channels; }
  int64_t pixels() const { return batch * height * width; }
  std::vector<int64_t> sizes(int64_t channels) const { return {batch, channels, height, width}; }
};

// Reads and checks the arguments.  `sizes` is the shape of the input; weights are weight and bias of every layer, then
// of the fusion.  A tensor without elements stands for an absent bias.
ResidualDenseBlockArgs parse_residual_dense_block(at::IntArrayRef sizes, const at::TensorOptions& options,
                                                  at::TensorList weights, double negative_slope, double scale,
                                                  double outer_scale);

void check_outer(const at::Tensor& input, const std::optional<at::Tensor>& outer);

}  // namespace fastdense

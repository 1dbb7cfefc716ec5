// SPDX-License-Identifier: Apache-2.0
// Front half of the residual dense block op, shared by all devices.
//
// L layers and one local fusion on a shared buffer [N, C, H, W] with channels innermost, C = c0 + L * k:
//
//   [pixels, C]   |<--- c0 --->|<-k->|<-k->| ... |<-k->|     layer l reads channels [first_l, c0 + l*k)
//                     input      y_0   y_1         y_L-1     and writes     [c0 + l*k, c0 + (l+1)*k)
//
//   y_l = LeakyReLU(conv3x3(what it reads) + bias),  f = conv(all) + bias (3x3 or 1x1),  r = scale * f + input,
//   and the result is r, or outer_scale * r + outer; without a fusion it is the buffer.
//
// The buffer is allocated by the forward op and is all that is saved for backward: the sign that LeakyReLU needs is
// that of its output.  Backward owns a gradient buffer of the same layout, to which every layer adds the gradient of
// its prefix; a slice is read when all layers behind it are done.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "core/geometry.h"
#include "core/layout.h"
#include "core/weights.h"

namespace fastdense {

struct ResidualLayerArgs {
  ConvArgs conv, bias;    // [k, channels, 3, 3] or the fusion's [c0, C, 1 or 3, ...]; [k] or undefined
  ConvGeometry geometry;  // of the image, and the kernel
  int64_t first = 0;      // channel of the buffer that it reads
  int64_t channels = 0;   // that it reads
  int64_t out = 0;        // channels that it makes

  // Where those that a layer makes begin.
  int64_t end() const { return first + channels; }
};

// What the op takes beside tensors.
struct ResidualDenseBlockOptions {
  at::IntArrayRef first_channels;  // of each layer
  bool fusion = true;
  double negative_slope = 0, scale = 1, outer_scale = 1;
};

struct ResidualDenseBlockArgs {
  std::vector<ResidualLayerArgs> layers;  // the fusion is the last, if there is one
  bool fusion = true;
  int64_t batch = 0, in_channels = 0, height = 0, width = 0;
  double negative_slope = 0, scale = 1, outer_scale = 1;

  int64_t channels() const { return layers.back().end() + (fusion ? 0 : layers.back().out); }
  bool is_fusion(size_t layer) const { return fusion && layer + 1 == layers.size(); }
  // Layers below the lowest one with a parameter or input that needs a gradient are left out.
  int64_t lowest_layer(const std::vector<bool>& needs) const;
  int64_t pixels() const { return batch * height * width; }
  std::vector<int64_t> sizes(int64_t channels) const { return {batch, channels, height, width}; }
};

// Reads and checks the arguments.  `sizes` is the shape of the input; weights are weight and bias of every layer, then
// of the fusion.  A tensor without elements stands for an absent bias.
ResidualDenseBlockArgs parse_residual_dense_block(const char* op, at::IntArrayRef sizes,
                                                  const at::TensorOptions& options, at::TensorList weights,
                                                  const ResidualDenseBlockOptions& how);

void check_outer(const char* op, const ResidualDenseBlockArgs& args, const at::Tensor& input,
                 const std::optional<at::Tensor>& outer);

}  // namespace fastdense

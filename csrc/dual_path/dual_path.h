// SPDX-License-Identifier: Apache-2.0
// Front half of the dual path stage op, shared by all devices: what the arguments mean, the checks, the allocations.
//
// A stage of n blocks (Chen et al., "Dual Path Networks", 2017) carries a residual path of R channels, to which every
// block adds, and a dense path, to which every block appends K channels.  The output is one tensor with channels
// innermost, and it is the stage's buffer:
//
//   [pixels, C]   |<---- R ---->|<- D0 ->|<-K->|<-K->| ... |<-K->|
//                   residual_n     split   y_1   y_2         y_n      block i writes residual_i and y_i
//
// Block i reads [residual_{i-1} | D0 + (i-1) K dense channels] as two segments; block 1 reads the input.  With a
// projection the split of conv_w(input) makes residual_0 and the first D0 dense channels; without one they are the
// input.  residual_0 is read by no norm then, so block 1 adds in place.
//
// Saved: the input, the output, mean and variance of every norm, and by memory mode
//   balanced     residual_1 ... residual_{n-1}, and a_i, b_i, the outputs of conv_a and conv_b
//   min          residual_1 ... residual_{n-1}; a_i and b_i are recomputed
//   reversible   a_i, b_i; residual_{i-1} = residual_i - conv_c(b_i) is recomputed
//   nothing      for inference: the residual path is updated in place
// The norm corrections of gradients are deferred (batch_norm_math.h): of a dense channel until the block that wrote it,
// of the residual path until the block before.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>
#include <vector>

#include "core/geometry.h"
#include "core/layout.h"
#include "core/weights.h"

namespace fastdense {

struct DualPathKeep {
  bool residuals, bottlenecks;
};

struct DualPathBlockArgs {
  NormArgs norm_a, norm_b, norm_c;
  ConvArgs conv_a, conv_b, conv_c;                // [ra, C_i, 1...], [rb, ra / groups, kernel...], [R + K, rb, 1...]
  int64_t channels = 0;                           // read by conv_a
  int64_t stats_a = 0, stats_b = 0, stats_c = 0;  // where the statistics of the norms start
};

struct DualPathArgs {
  std::vector<DualPathBlockArgs> blocks;
  bool projection = false;
  NormArgs norm_w;
  ConvArgs conv_w;  // [R + D0, C_in, 1...]
  int64_t stats_w = 0;
  int64_t batch = 0, in_channels = 0;
  int64_t residual = 0, first_dense = 0, growth = 0;  // R, D0, K
  int64_t width_a = 0, width_b = 0, groups = 1;
  int64_t statistics = 0;
  std::vector<int64_t> spatial, kernel;
  std::string process_group;       // see SyncBatchNorm
  std::vector<int64_t> constants;  // positions of weights without a gradient
  PoolGeometry sampled{};          // the pixels of the input that conv_w and conv_b are centred on

  int64_t num_blocks() const { return int64_t(blocks.size()); }
  int64_t dense(int64_t blocks_done) const { return first_dense + blocks_done * growth; }
  int64_t channels() const { return residual + dense(num_blocks()); }
  int64_t in_pixels() const { return batch * sampled.size[0] * sampled.size[1] * sampled.size[2]; }
  int64_t pixels() const { return batch * sampled.pixels(); }
  bool strided() const { return pixels() != in_pixels(); }
  // Pixels that conv_a of block i (from 0) works on, and where its rows of `a` start.
  int64_t a_pixels(int64_t i) const { return i == 0 ? in_pixels() : pixels(); }
  int64_t a_row(int64_t i) const { return i == 0 ? 0 : in_pixels() + (i - 1) * pixels(); }
  // Norms with the convolution behind each, counted in their order: the projection's, then three for each block.
  int64_t pairs() const { return projection + 3 * num_blocks(); }
  int64_t pair_a(int64_t i) const { return projection + 3 * i; }
  int64_t pair_b(int64_t i) const { return pair_a(i) + 1; }
  int64_t pair_c(int64_t i) const { return pair_a(i) + 2; }
  bool any_batch_statistics() const;
  // Backward leaves out the blocks below the lowest one with a parameter or input that needs a gradient; `needs` is
  // that of the input and of every weight.
  int64_t lowest_block(const std::vector<bool>& needs) const;
  std::vector<int64_t> sizes(int64_t channels, bool of_input = false) const;
};

// What the op takes beside the input, the weights and what to save.
struct DualPathOptions {
  at::ArrayRef<double> eps;  // of each norm
  int64_t num_blocks;
  bool projection;
  int64_t residual_channels, stride;
  std::string_view process_group;
};

// Reads and checks the arguments.  `sizes` is the shape of the input; the lists are laid out as in ops/dual_path.py:
// norm (weight, bias, running_mean, running_var) and conv of the projection if there is one, then norm_a, conv_a,
// norm_b, conv_b, norm_c, conv_c of each block.
DualPathArgs parse_dual_path(const char* op, at::IntArrayRef sizes, const at::TensorOptions& options,
                             at::TensorList weights, const DualPathOptions& how);

DualPathKeep parse_dual_path_memory(const char* op, std::string_view memory);

// What the forward op took and returned.
struct DualPathSaved {
  at::Tensor input, out, residuals, a, b, mean, var;
};
// Checks what hooks on saved tensors may have changed, and lays it out as forward left it.
DualPathSaved check_dual_path_saved(const char* op, const DualPathArgs& args, const at::Tensor& grad_output,
                                    const DualPathSaved& given);

struct DualPathOutputs {
  at::Tensor out;        // [N, C, spatial]
  at::Tensor residuals;  // [n - 1 or 0, pixels, R]
  at::Tensor a, b;       // [rows of all blocks or 0, ra], likewise rb
  at::Tensor mean, var;  // [statistics]
};
DualPathOutputs allocate_dual_path(const DualPathArgs& args, const at::TensorOptions& options, DualPathKeep keep);

}  // namespace fastdense

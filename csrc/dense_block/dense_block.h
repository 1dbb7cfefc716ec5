// SPDX-License-Identifier: Apache-2.0
// Front half of the dense block op, shared by all devices: what the arguments mean, the checks, the allocations.
//
// Shared buffer.  A block of L layers owns one buffer [N, C, spatial] with channels innermost, C = c0 + L * k:
//
//   [pixels, C]   |<--- c0 --->|<-k->|<-k->| ... |<-k->|     layer l reads channels [0, c0 + l*k)
//                     input      y_0   y_1         y_L-1     and writes     [c0 + l*k, c0 + (l+1)*k)
//
// It is allocated by the forward op, saved for backward, and is the block's output; nothing is cached between calls.
// In forward every slice is written once, by its own layer, and its batch statistics are taken then; all layers share
// them.  Backward reads it and owns a gradient buffer of the same layout.
//
// The norm corrections of a channel's gradient are deferred (batch_norm_math.h) until its own layer takes it.
//
// Stochastic depth drops layers: a dropped one writes zeros, which later layers read like any other values (mean and
// variance 0), and neither pass computes or saves anything else for it.
//
// Instance and group norms have statistics of each sample: those of single channels are taken once per sample, when a
// slice is written, and a norm's coefficients, a row of them for each sample, follow from them, whatever groups of
// channels it has.  So do the corrections, of which there are two numbers per sample and channel.
//
// Each norm is followed by its activation, ReLU unless another is named.  Activations have no state: backward makes
// what they read again from the buffer and takes their derivative there.
//
// Saved: the buffer, mean and variance [C + L*b], or [N, C + L*b] of each sample, and in `keep_bottleneck` mode the 1x1
// outputs z [layers that are not dropped, pixels, b]. Recomputed: norm + ReLU of every prefix, norm2 + ReLU, dropout
// masks, and z when it was not saved.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/activation_args.h"
#include "core/geometry.h"
#include "core/layout.h"
#include "core/weights.h"

namespace fastdense {

enum class Tail { kNone, kTransition, kNorm, kNormRelu };

struct LayerArgs {
  NormArgs norm1, norm2;  // norm2, act2 and conv1 only with a bottleneck
  ActivationArgs act1, act2;
  ConvArgs conv1, conv2;  // [b, c, 1...], [k, b or c, kernel...]
  ConvArgs bias1, bias2;  // [b], [k], or undefined
  int64_t channels = 0;   // of the prefix that it reads
  bool dropped = false;   // the slice is zeros, and nothing is computed
  int64_t z_index = 0;    // its place in z: layers before it that are not dropped
};

struct DenseBlockArgs {
  std::vector<LayerArgs> layers;
  bool bottleneck = false;
  int64_t batch = 0, in_channels = 0, growth = 0, width = 0;  // width = b, 0 without a bottleneck
  std::vector<int64_t> spatial;
  ConvGeometry conv{};
  Tail tail = Tail::kNone;
  NormArgs tail_norm;
  ActivationArgs tail_act;
  ConvArgs tail_conv;  // [co, C, 1...]
  ConvArgs tail_bias;  // [co], or undefined
  PoolGeometry pool{};
  double drop_rate = 0;
  bool recompute = false;          // backward runs forward again: both runs make z, whatever their norms are
  bool per_sample = false;         // norms that are not frozen have statistics of one sample, not of the batch
  std::string process_group;       // see SyncBatchNorm
  std::vector<int64_t> constants;  // positions of weights without a gradient
  std::vector<int64_t> readers;    // of each weight: the layer that reads it, or their number for the tail's

  int64_t channels() const { return in_channels + int64_t(layers.size()) * growth; }
  int64_t pixels() const { return batch * conv.pixels(); }
  int64_t statistics() const { return channels() + int64_t(layers.size()) * width; }
  std::vector<int64_t> statistics_sizes() const;
  // Sets of rows with statistics of their own.
  int64_t sets() const { return per_sample ? batch : 1; }
  // Where the statistics of layer l's norm2 start; those of prefixes start at 0.
  int64_t norm2_statistics(int64_t l) const { return channels() + l * width; }
  int64_t active_layers() const;
  bool any_batch_statistics() const;
  bool has_extras() const;  // another activation than ReLU, a bias, or norms that are no batch norms
  // Whether forward computes every statistic; what it does not compute is zero.
  bool all_statistics() const;
  // Backward leaves out the layers below the lowest one with a parameter or input that needs a gradient; `needs` is
  // that of the input and of every weight.
  int64_t lowest_layer(const std::vector<bool>& needs) const;
  std::vector<int64_t> sizes(int64_t channels, bool pooled = false) const;
  std::vector<int64_t> out_sizes() const;
};

// What the op takes beside the input and the weights.
struct DenseBlockOptions {
  at::ArrayRef<double> eps;  // of each norm
  int64_t num_layers;
  bool bottleneck;
  std::string_view tail;
  double drop_rate;
  const std::optional<at::Tensor>& seed;
  std::string_view process_group;
  std::string_view activations;
  at::ArrayRef<double> activation_parameters;
  at::IntArrayRef groups;  // of each norm
};

// Reads and checks the arguments.  `sizes` is the shape of the input; the lists are laid out as in ops/dense_block.py:
// for each layer norm1 (weight, bias, running_mean, running_var), conv1, norm2 (4), conv2, then the tail's norm and
// conv. A tensor without elements stands for an absent one; convolutions of no channels, [b, 0, 1...] and
// [k, 0, kernel...], for a dropped layer's.  Behind these, if any is given: for each layer PReLU's parameter of act1,
// the bias of conv1, PReLU's parameter of act2, the bias of conv2 (without a bottleneck the first and the last of
// them), then the same of the tail.  `activations` has one name for each norm, or none where all are ReLU, and
// `activation_parameters` two numbers for each, see ActivationReader.  `groups` has for each norm how many groups of
// channels share statistics of one sample: as many as channels for an instance norm, 0 for frozen norms and those of
// dropped layers; it is empty where norms take the statistics of the batch.
DenseBlockArgs parse_dense_block(const char* op, at::IntArrayRef sizes, const at::TensorOptions& options,
                                 at::TensorList weights, const DenseBlockOptions& how);

// What forward kept for backward.
struct DenseBlockSaved {
  at::Tensor buffer, mean, var, z;
};
// Checks what hooks on saved tensors may have changed, and lays it out as forward left it.
DenseBlockSaved check_dense_block_saved(const char* op, const DenseBlockArgs& args, const at::Tensor& grad_output,
                                        const DenseBlockSaved& given);

struct DenseBlockOutputs {
  at::Tensor buffer, mean, var, z, out;
};
DenseBlockOutputs allocate_dense_block(const DenseBlockArgs& args, const at::TensorOptions& options,
                                       bool keep_bottleneck);

}  // namespace fastdense

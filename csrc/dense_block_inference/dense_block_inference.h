// SPDX-License-Identifier: Apache-2.0
// Front half of dense blocks in inference: all norms are frozen and nothing is kept for backward.
//
// Weights are folded and packed first.  pack_dense_block gives
//   header             see cpu/packed.h
//   numbers            for each layer scale and shift of norm1 [2, channels], which differ between the layers that read
//                      a channel, and norm2's shift [b]; then scale and shift of the tail's norm
//   panels  bytes      for each layer norm2's scale times conv1, conv2 for products of its taps and, where it is 3x3,
//                      transformed for F(4x4, 3x3); then a transition's convolution
// each in one piece, which is read from its beginning to its end.
//
// dense_block_inference takes them beside the weights, or packs by itself.  No statistic is taken: a thread takes a few
// images through the whole block, whose features stay in its cache, and only what the tail makes of them is a tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "dense_block/dense_block.h"

namespace fastdense {

// How many bytes panels have.
struct PanelSizes {
  int64_t panel, align, operand_bytes;
  int64_t taps;
  int64_t squares;  // products of F(4x4, 3x3), or 0 where only the taps are added up

  int64_t padded(int64_t n) const { return (n + panel - 1) / panel * panel; }
  int64_t conv1x1(int64_t depth, int64_t n) const {
    return padded(n) * ((depth + align - 1) / align * align) * operand_bytes;
  }
  int64_t conv_taps(int64_t depth, int64_t n) const { return conv1x1(depth, taps * n); }
  int64_t conv_squares(int64_t depth, int64_t n) const { return squares * conv1x1(depth, n); }
};

// How conv2 is packed: for one call, or for any.
struct ConvForms {
  bool taps, squares;
};

// Where the parts of packed weights begin: numbers, and bytes of panels.
class PackedLayout {
 public:
  struct Layer {
    int64_t coefficients = 0, bias1 = 0;
    int64_t conv1 = 0, taps = 0, squares = 0;
  };
  PackedLayout(const DenseBlockArgs& args, const PanelSizes& sizes, const ConvForms& forms);

  std::vector<Layer> layers;
  int64_t tail_coefficients = 0, tail_conv = 0;
  int64_t numbers = 0, bytes = 0;  // of all
};

struct PackedBlock {
  PackedLayout layout;
  at::Tensor numbers, panels;
};

// Checks that a block is one of frozen norms and ReLU.
void check_inference(const char* op, const DenseBlockArgs& args);

// Without numbers yet, or on the meta device.
PackedBlock empty_packed(const PackedLayout& layout, const at::TensorOptions& options);
std::vector<at::Tensor> to_list(const PackedBlock& packed);
// Reads what to_list() gave, and checks it.
PackedBlock read_packed(const char* op, const PackedLayout& layout, at::TensorList packed, at::ScalarType dtype);

}  // namespace fastdense

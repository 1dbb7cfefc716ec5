// SPDX-License-Identifier: Apache-2.0
// Front half of dense blocks in inference: all norms are frozen and nothing is kept for backward.
//
// Weights are folded and packed first.  pack_dense_block gives
//   header       [1] int64      the instruction set; panels mean nothing to another one, and are never stored
// and for each layer
//   coefficients [2, channels]  scale and shift of norm1, which differ between the layers that read a channel
//   conv1        bytes          norm2's scale times conv1, in panels; empty without a bottleneck
//   bias1        [b]            norm2's shift; empty without a bottleneck
//   conv2        bytes          in panels, transformed for F(4x4, 3x3) where it is 3x3
// and for the tail its coefficients, and a transition's convolution.
//
// dense_block_inference takes them beside the weights, or packs by itself.  No statistic is taken: a thread takes a few
// images through the whole block, whose features stay in its cache, and only what the tail makes of them is a tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "dense_block/dense_block.h"

namespace fastdense {

struct PackedLayer {
  at::Tensor coefficients, conv1, bias1, conv2;
};

struct PackedBlock {
  std::vector<PackedLayer> layers;
  at::Tensor tail_coefficients, tail_conv;
};

// How many bytes panels have.
struct PanelSizes {
  int64_t panel, align, operand_bytes;
  int64_t taps;
  int64_t squares;  // products of F(4x4, 3x3), or 0 where the taps are added up

  int64_t padded(int64_t n) const { return (n + panel - 1) / panel * panel; }
  int64_t conv1x1(int64_t depth, int64_t n) const {
    return padded(n) * ((depth + align - 1) / align * align) * operand_bytes;
  }
  int64_t conv(int64_t depth, int64_t n) const {
    return squares > 0 ? squares * conv1x1(depth, n) : conv1x1(depth, taps * n);
  }
};

// Checks that a block is one of frozen norms and ReLU.
void check_inference(const char* op, const DenseBlockArgs& args);

// What to_list() gives, without numbers: on the meta device.
std::vector<at::Tensor> empty_packed(const DenseBlockArgs& args, const PanelSizes& sizes,
                                     const at::TensorOptions& options);
std::vector<at::Tensor> to_list(const PackedBlock& packed, const DenseBlockArgs& args);
// Reads what to_list() gave, and checks it.
PackedBlock read_packed(const char* op, const DenseBlockArgs& args, at::TensorList packed, const PanelSizes& sizes,
                        at::ScalarType dtype);

}  // namespace fastdense

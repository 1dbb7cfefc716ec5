// SPDX-License-Identifier: Apache-2.0
// CPU kernels of grouped 3x3 convolutions with few channels a group, channels innermost: norm + ReLU on the way in;
// backward with the ReLU's mask, the norm's sums and the gradient of the weight.  They do what one thread does with
// some rows of one image and one bundle of groups.  GroupedConvolution3x3 (cpu/grouped_conv/grouped_conv.h) owns the
// loops over these, the threads and all memory.
//
// A bundle is worked on by whole vectors.  Its lanes are either the output channels of one group, or as many groups as
// a vector has lanes, channel by channel: then any number of channels a group fills them.
#pragma once

#include <algorithm>

#include "cpu/conv1x1/conv1x1_kernels.h"

namespace fastdense {

constexpr int64_t kMostGroupChannels = 32;

// Padding 1, stride 1 or 2.
struct GroupedConv {
  int64_t images, height, width, stride;
  int64_t groups, in, out;  // in, out: channels of a group

  int64_t out_height() const { return (height - 1) / stride + 1; }
  int64_t out_width() const { return (width - 1) / stride + 1; }
};

// Rows of the output of one image.  Those of the input that belong to them are `stride` times as many.
struct OutputRows {
  int64_t image, first, count;
};

struct GroupedConvLayout {
  int64_t bundles;
  int64_t columns;  // of the output that a bundle makes, but for the last
  int64_t weights;  // numbers of the weights of a bundle, and of their gradient
  int64_t rows;     // of the output that are worked on at once
  int64_t workspace_bytes;
};

template <typename T>
struct GroupedConvKernels {
  using A = accumulate_t<T>;
  GroupedConvLayout (*layout)(const GroupedConv&);
  // Weights [groups * out, in, 3, 3] of a bundle in the order of the products; reversed: for the gradient of the input.
  void (*pack)(const A* weight, const GroupedConv&, bool reversed, int64_t bundle, A* packed);
  // out [pixels, groups * out]
  void (*forward)(const GroupedConv&, const OutputRows&, int64_t bundle, const Source<T>&, const A* packed, T* out,
                  void* workspace);
  // dy [pixels, groups * out]: the gradient of the output.  The epilogue's dweight is the bundle's.
  void (*backward)(const GroupedConv&, const OutputRows&, int64_t bundle, const Source<T>&, const T* dy,
                   const A* reversed, const BackwardEpilogue<T>&, void* workspace);
  // weight of a bundle = the gradient that backward() added up
  void (*unpack)(const A* packed, const GroupedConv&, int64_t bundle, A* weight);
};

FASTDENSE_EACH_ISA(template <typename T> const GroupedConvKernels<T>& grouped_conv_kernels();)

template <typename T>
inline const GroupedConvKernels<T>& grouped_conv_kernels(Isa isa) {
  return FASTDENSE_DISPATCH(isa, grouped_conv_kernels<T>());
}

}  // namespace fastdense

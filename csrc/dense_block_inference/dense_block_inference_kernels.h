// SPDX-License-Identifier: Apache-2.0
// CPU kernels of dense blocks in inference: their 3x3 convolutions by Winograd's F(4x4, 3x3) (cpu/conv/winograd4.h).
// Everything else is done by the kernels of cpu/conv1x1 and of the dense block, whose conventions hold here.
#pragma once

#include "core/geometry.h"
#include "cpu/conv1x1/conv1x1_kernels.h"

namespace fastdense {

// Squares of 4x4 results of a convolution, counted through all images.
struct SquareRange {
  int64_t first, count;
};

template <typename T>
struct DenseBlockInferenceKernels {
  using A = accumulate_t<T>;

  // Whether a convolution goes this way.
  bool (*uses_squares)(const ConvGeometry&);
  // Squares that a thread works on at once, at most, and the workspace for so many.
  int64_t (*most_squares)(int64_t channels);
  int64_t (*workspace_bytes)(int64_t channels);
  // Columns of a weight [n, depth, 3, 3] as a panel, of `products` times as many numbers as that of a 1x1 convolution.
  int64_t products;
  void (*pack)(const A* weight, int64_t depth, int64_t n, void* panel);
  // slice = conv(relu(source)) at the pixels of squares; a source without scale and shift is relu(x)
  void (*conv)(const Source<T>&, const ConvGeometry&, const SquareRange&, const void* panels, const Target<T>& slice,
               void* workspace);
};

// Squares along an axis, and of an image.
inline int64_t squares_along(int64_t size) { return (size + 3) / 4; }
inline int64_t squares_of_image(const ConvGeometry& g) { return squares_along(g.size[0]) * squares_along(g.size[1]); }

FASTDENSE_EACH_ISA_BF16(template <typename T> const DenseBlockInferenceKernels<T>& dense_block_inference_kernels();)

template <typename T>
inline const DenseBlockInferenceKernels<T>& dense_block_inference_kernels(Isa isa) {
  FASTDENSE_RETURN_DISPATCH_BF16(T, isa, dense_block_inference_kernels<T>());
}

}  // namespace fastdense
